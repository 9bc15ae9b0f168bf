// How fast llama.cpp reads a prompt and writes after it, on the CPU: beside the example bench_decode.
//
// Usage: npm install node-llama-cpp; node decode.mjs MODEL.gguf THREADS
// (its ready-made libraries know every processor; run it where node_modules is). The same prompt and
// tokens; the median of seven runs after one to warm up. Prints a JSON object like bench_decode's.
import {readFileSync} from "node:fs";
import {getLlama} from "node-llama-cpp";

const [model_path, threads] = [process.argv[2], Number(process.argv[3])];
const written = 64;
const prompt = readFileSync(new URL("prompt.txt", import.meta.url), "utf8");
const llama = await getLlama({gpu: false, build: "never", maxThreads: threads, logLevel: "error"});
const model = await llama.loadModel({modelPath: model_path});
const context = await model.createContext({contextSize: 1024, batchSize: 512, threads});
const sequence = context.getSequence();
const tokens = model.tokenize(prompt);
const median = (of) => of.slice(1).sort((a, b) => a - b)[(of.length - 1) >> 1];
const reads = [], writes = [];
for (let run = 0; run < 8; run++) {
    await sequence.clearHistory();
    const begun = performance.now();
    let first = 0, count = 0;
    for await (const _ of sequence.evaluate(tokens, {temperature: 0, yieldEogToken: true})) {
        if (count === 0) first = performance.now();
        if (++count === written) break;
    }
    reads.push(tokens.length / (first - begun) * 1000);
    writes.push((count - 1) / (performance.now() - first) * 1000);
}
console.log(JSON.stringify({
    runner: "llama.cpp", threads, prompt_tokens: tokens.length, written,
    read_per_second: median(reads), written_per_second: median(writes),
}));
process.exit(0);
