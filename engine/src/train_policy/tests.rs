//! Against TRL and against Eq. 7 written out in torch; the files and the scripts that made
//! them are in tests/golden/policy.

use super::*;
use crate::lm::learn::Products;
use crate::lm::{Config, Precision};
use crate::soft_prompt::SoftPromptConfig;
use crate::weights::Weights;
use serde_json::Value;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/golden/policy")
        .join(name)
}

fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(golden(name)).unwrap()).unwrap()
}

fn tiny() -> Decoder {
    let text = std::fs::read_to_string(golden("base/config.json")).unwrap();
    let config = Config::from_json("config.json", &text).unwrap();
    let weights = Weights::open(&golden("base/model.safetensors")).unwrap();
    Decoder::load(
        &weights,
        &config,
        Precision::Dense(DType::F32),
        &Device::Cpu,
    )
    .unwrap()
}

fn adapter(model: &Decoder, name: &str) -> Adapter {
    Adapter::load(&golden(name), &model.config, &Device::Cpu).unwrap()
}

fn ids(text: &str) -> Vec<u32> {
    let id = |w: &str| match w {
        "<eos>" => 61,
        w => w[1..].parse().unwrap(),
    };
    text.split_whitespace().map(id).collect()
}

fn trl_groups() -> Vec<PairGroup> {
    let rows = json("pairs.json");
    let text = |row: &Value, key: &str| ids(row[key].as_str().unwrap());
    let group = |row: &Value| PairGroup {
        user: String::new(),
        prompt: text(row, "prompt"),
        pairs: vec![TokenPair {
            chosen: text(row, "chosen"),
            rejected: text(row, "rejected"),
        }],
    };
    rows.as_array().unwrap().iter().map(group).collect()
}

fn options(form: Form, loss: Loss) -> DpoOptions {
    DpoOptions {
        loss: LossOptions {
            loss,
            beta: 0.1,
            label_smoothing: if loss == Loss::Robust { 0.1 } else { 0.0 },
        },
        lr_adapter: 1e-2,
        weight_decay: 0.0,
        dropout: 0.0,
        adam: AdamWOptions {
            max_grad_norm: None,
            ..AdamWOptions::default()
        },
        ..DpoOptions::paper(form)
    }
}

fn go_on(_: usize, _: usize) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn close(name: &str, got: f64, want: f64, tolerance: f64) {
    let gap = (got - want).abs() / want.abs().max(1.0);
    assert!(gap <= tolerance, "{name}: got {got}, expected {want}");
}

#[test]
fn three_steps_of_each_loss_log_what_trl_logs() {
    let model = tiny();
    let expected = json("trl_metrics.json");
    let groups = trl_groups();
    let all: Vec<usize> = (0..groups.len()).collect();
    for loss in [Loss::Sigmoid, Loss::Ipo, Loss::Robust, Loss::SigmoidNorm] {
        let name = serde_json::to_value(loss).unwrap();
        let steps = expected[name.as_str().unwrap()].as_array().unwrap().clone();
        let start = adapter(&model, "sft_adapter");
        let trained = start.trainable().unwrap();
        let options = options(Form::Vanilla, loss);
        let reference = reference_logps(&model, Some(&start), &groups, None, go_on).unwrap();
        let policy = Policy {
            adapter: &trained,
            soft: None,
            users: None,
        };
        let mut optimizer = dpo_optimizer(&policy, &options).unwrap();
        for (n, want) in steps.iter().enumerate() {
            let result = dpo_batch(
                &model,
                &policy,
                &groups,
                &reference,
                &all,
                &options,
                n,
                &mut optimizer,
            )
            .unwrap();
            let mut metrics = result.metrics();
            metrics.grad_norm = optimizer.step(1.0).unwrap();
            let got = serde_json::to_value(&metrics).unwrap();
            for (key, value) in want.as_object().unwrap() {
                if key == "num_tokens" {
                    continue; // TRL counts the prompt twice
                }
                let what = format!("{loss:?} step {n} {key}");
                close(
                    &what,
                    got[key].as_f64().unwrap(),
                    value.as_f64().unwrap(),
                    1e-4,
                );
            }
        }
        if loss == Loss::Sigmoid {
            let after = adapter(&model, "dpo_adapter").tensors();
            for (key, var) in trained.vars() {
                let gap = (var.as_tensor() - &after[key]).unwrap().abs().unwrap();
                let gap = gap.max_all().unwrap().to_scalar::<f32>().unwrap();
                assert!(gap < 2e-4, "{key}: {gap}");
            }
        }
    }
}

#[test]
fn eq_7_and_all_its_gradients_are_those_written_out_in_torch() {
    let model = tiny();
    let oracle = json("cdpo_oracle.json");
    let file = load_tensors(&golden("cdpo_oracle.safetensors"), &Device::Cpu).unwrap();
    let list = |v: &Value| -> Vec<u32> {
        v.as_array()
            .unwrap()
            .iter()
            .map(|x| x.as_u64().unwrap() as u32)
            .collect()
    };
    let groups: Vec<PairGroup> = (0..2)
        .map(|b| PairGroup {
            user: format!("u{b}"),
            prompt: list(&oracle["prompt"][b]),
            pairs: vec![TokenPair {
                chosen: list(&oracle["chosen"][b]),
                rejected: list(&oracle["rejected"][b]),
            }],
        })
        .collect();
    let reference: Vec<Vec<f32>> = (0..2)
        .map(|b| vec![oracle["rec"][b]["dref"].as_f64().unwrap() as f32, 0.0])
        .collect();
    // The reference itself, from the frozen adapter.
    let frozen = adapter(&model, "sft_adapter");
    let computed = reference_logps(&model, Some(&frozen), &groups, None, go_on).unwrap();
    for (c, r) in computed.iter().zip(&reference) {
        close(
            "reference gap",
            f64::from(c[0] - c[1]),
            f64::from(r[0]),
            1e-5,
        );
    }
    let h = Var::from_tensor(&file["h"].reshape((8, 16)).unwrap()).unwrap();
    let w = file["w"].to_vec2::<f32>().unwrap();
    let mut neighbors = vec![Vec::new(); 8];
    for b in 0..2 {
        neighbors[4 * b] = (0..3)
            .map(|j| (4 * b + 1 + j, f64::from(w[b][j])))
            .collect();
    }
    let users = Conditioning {
        index: [("u0".to_string(), 0), ("u1".to_string(), 4)].into(),
        embeddings: Box::new(|| Ok(h.as_tensor().clone())),
        vars: vec![("h".into(), h.clone())],
        neighbors,
    };
    let config = SoftPromptConfig {
        embedding: 16,
        inner: 64,
        tokens: 8,
        hidden: 32,
        scale: 1.0,
        normalize: false,
        bounded: false,
        everyone: None,
    };
    let params = Params::new(0, Device::Cpu);
    for name in ["0.weight", "0.bias", "2.weight", "2.bias"] {
        params
            .insert(format!("mlp.{name}"), &file[&format!("mlp.{name}")])
            .unwrap();
    }
    let soft = SoftPrompt::new(config, params.builder(DType::F32)).unwrap();
    let trained = adapter(&model, "dpo_adapter").trainable().unwrap();
    let policy = Policy {
        adapter: &trained,
        soft: Some((&soft, &params)),
        users: Some(&users),
    };
    for rows_per_pass in [1, 4] {
        let mut options = options(DpoOptions::collaborative(), Loss::Sigmoid);
        options.rows_per_pass = rows_per_pass;
        let mut optimizer = dpo_optimizer(&policy, &options).unwrap();
        let result = dpo_batch(
            &model,
            &policy,
            &groups,
            &reference,
            &[0, 1],
            &options,
            0,
            &mut optimizer,
        )
        .unwrap();
        close(
            "total",
            result.loss,
            oracle["total"].as_f64().unwrap(),
            1e-5,
        );
        assert!(
            optimizer.without_gradient().is_empty(),
            "{:?}",
            optimizer.without_gradient()
        );
        let mut compared = 0;
        for (name, want) in &file {
            let name = match name.as_str() {
                "h_grad" => "h".to_string(),
                n if n.starts_with("mlp_grad.") => n.replace("mlp_grad.", "mlp."),
                n if n.starts_with("lora_grad.") => {
                    n["lora_grad.".len()..].replace(".default.weight", ".weight")
                }
                _ => continue,
            };
            let got = optimizer
                .gradient(&name)
                .unwrap_or_else(|| panic!("no gradient {name}"));
            let gap = (got - want.reshape(got.dims()).unwrap())
                .unwrap()
                .abs()
                .unwrap();
            let gap = gap.max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(gap <= 1e-5, "{name}: {gap}");
            compared += 1;
        }
        assert_eq!(compared, 28 + 4 + 1);
    }
}

#[test]
fn completions_that_share_a_prompt_score_as_if_alone() {
    let model = tiny();
    let adapter = adapter(&model, "sft_adapter");
    let completions: [&[u32]; 4] = [&[5, 6, 61], &[7, 61], &[61], &[1, 2, 3, 4, 5]];
    let prompts: [&[u32]; 2] = [&[9, 8, 7], &[3]];
    let soft = Tensor::from_vec(
        Philox::new(1, 1).normals(2 * 3 * 32),
        (2, 3, 32),
        &Device::Cpu,
    );
    let soft = soft.unwrap();
    let rows: Vec<Row> = prompts
        .iter()
        .map(|p| Row {
            prompt: p,
            completions: completions.to_vec(),
        })
        .collect();
    let together = score(&model, Some(&adapter), None, Some(&soft), &rows, true).unwrap();
    let together_logps = together.logps.to_vec1::<f32>().unwrap();
    for (r, prompt) in prompts.iter().enumerate() {
        for (c, completion) in completions.iter().enumerate() {
            let row = Row {
                prompt,
                completions: vec![completion],
            };
            let own = soft.narrow(0, r, 1).unwrap();
            let alone = score(&model, Some(&adapter), None, Some(&own), &[row], true).unwrap();
            let i = r * completions.len() + c;
            let alone_logp = alone.logps.to_vec1::<f32>().unwrap()[0];
            close(
                "logp",
                f64::from(together_logps[i]),
                f64::from(alone_logp),
                1e-5,
            );
            close("entropy", together.entropy[i], alone.entropy[0], 1e-5);
            assert_eq!(together.correct[i], alone.correct[0]);
        }
    }
}

#[test]
fn the_passes_by_hand_are_those_by_tensors_with_all_gradients() {
    let mut model = tiny();
    let adapter = adapter(&model, "sft_adapter").trainable().unwrap();
    let soft = Philox::new(1, 1).normals(2 * 3 * 32);
    let soft = Tensor::from_vec(soft, (2, 3, 32), &Device::Cpu).unwrap();
    let soft = Var::from_tensor(&soft).unwrap();
    let rows = [
        Row {
            prompt: &[9, 8, 7, 6],
            completions: vec![&[5, 6, 61], &[7, 61], &[61], &[1, 2, 3, 4, 5]],
        },
        Row {
            prompt: &[3],
            completions: vec![&[4, 4, 61]],
        },
    ];
    // Any dropout, even of nothing, goes through tensor operations.
    let tensors = Some(Dropout {
        p: 0.0,
        seed: 0,
        step: 0,
    });
    let pass = |model: &Decoder, dropout| {
        let scores = score(
            model,
            Some(&adapter),
            dropout,
            Some(soft.as_tensor()),
            &rows,
            true,
        );
        let scores = scores.unwrap();
        let weights = Tensor::new(&[1f32, -2.0, 0.5, 3.0, -1.0], &Device::Cpu).unwrap();
        let loss = (&scores.logps * weights).unwrap().sum_all().unwrap();
        let gradients = loss.backward().unwrap();
        let vars = adapter.vars().values().chain([&soft]);
        let all: Vec<Vec<f32>> = vars
            .map(|v| gradients.get(v).expect("a gradient").flatten_all().unwrap())
            .map(|g| g.to_vec1().unwrap())
            .collect();
        (scores, all)
    };
    let (by_hand, gradients) = pass(&model, None);
    let (by_tensors, expected) = pass(&model, tensors);
    assert_eq!(by_hand.correct, by_tensors.correct);
    let logps = |s: &Scores| s.logps.to_vec1::<f32>().unwrap();
    let sides = [
        (logps(&by_hand), logps(&by_tensors)),
        (
            by_hand.entropy.iter().map(|x| *x as f32).collect(),
            by_tensors.entropy.iter().map(|x| *x as f32).collect(),
        ),
        (
            by_hand.logits.iter().map(|x| *x as f32).collect(),
            by_tensors.logits.iter().map(|x| *x as f32).collect(),
        ),
    ];
    let pairs = sides.iter().map(|(a, b)| (a, b));
    for (got, want) in pairs.chain(gradients.iter().zip(&expected)) {
        for (g, w) in got.iter().zip(want) {
            close("by hand", f64::from(*g), f64::from(*w), 1e-5);
        }
    }
    model.learn_in(Products::Bf16);
    let (_, rounded) = pass(&model, None);
    let (rounded, exact) = (rounded.concat(), expected.concat());
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
    let cosine = dot(&rounded, &exact) / (dot(&rounded, &rounded) * dot(&exact, &exact)).sqrt();
    assert!(cosine > 0.999, "gradients in bf16: cosine {cosine}");
}

/// A prompt with its preferred answer, to be fine-tuned on.
fn preferred(group: &PairGroup) -> SftGroup {
    SftGroup {
        prompt: group.prompt.clone(),
        completions: vec![group.pairs[0].chosen.clone()],
    }
}

/// A run over the TRL pairs with users, from a folder.
fn small_run(folder: &Path, steps_now: usize, resume: bool) -> (Metrics, Vec<Vec<f32>>) {
    let model = tiny();
    let mut groups = trl_groups();
    groups
        .iter_mut()
        .enumerate()
        .for_each(|(i, g)| g.user = format!("u{}", i % 4));
    let table = Params::new(5, Device::Cpu);
    let init = candle_nn::Init::Randn {
        mean: 0.0,
        stdev: 1.0,
    };
    table
        .builder(DType::F32)
        .get_with_hints((4, 6), "users", init)
        .unwrap();
    let var = table.get("users").unwrap();
    let users = Conditioning {
        index: (0..4).map(|i| (format!("u{i}"), i)).collect(),
        embeddings: Box::new(|| Ok(var.as_tensor().clone())),
        vars: table.vars(),
        neighbors: (0..4)
            .map(|i| vec![((i + 1) % 4, 2.0), ((i + 2) % 4, 1.0)])
            .collect(),
    };
    let config = SoftPromptConfig {
        embedding: 6,
        inner: 8,
        tokens: 2,
        hidden: 32,
        scale: 1.0,
        normalize: true,
        bounded: false,
        everyone: None,
    };
    let (soft, params) = SoftPrompt::fresh(config, 1, &Device::Cpu).unwrap();
    let start = adapter(&model, "sft_adapter");
    let trained = start.trainable().unwrap();
    let policy = Policy {
        adapter: &trained,
        soft: Some((&soft, &params)),
        users: Some(&users),
    };
    let options = DpoOptions {
        steps: 6,
        groups: 2,
        dropout: 0.1,
        checkpoint_steps: 2,
        lr_adapter: 1e-2,
        lr_users: 1e-2,
        reading_weight: 0.5,
        ..DpoOptions::default_for(DpoOptions::collaborative())
    };
    let read: Vec<SftGroup> = groups.iter().take(3).map(preferred).collect();
    let embeddings = var.as_detached_tensor();
    let reading = Reading {
        soft: &soft,
        embeddings: &embeddings,
        users: vec![0, 1, 2],
    };
    let data = (groups.as_slice(), Some((read.as_slice(), &reading)));
    let count = std::cell::Cell::new(0);
    let journal = Journal {
        folder: folder.to_path_buf(),
        resume,
        progress: Box::new(|at| {
            count.set(count.get() + usize::from(matches!(at, Progress::Step { .. })));
            if count.get() == steps_now {
                panic!("killed"); // stands for a kill: nothing after it runs
            }
            ControlFlow::Continue(())
        }),
    };
    let run = std::panic::AssertUnwindSafe(|| {
        train_dpo(&model, &policy, Some(&start), data, &options, journal).unwrap()
    });
    let metrics = std::panic::catch_unwind(run).unwrap_or_default();
    let mut weights: Vec<Vec<f32>> = trained
        .vars()
        .values()
        .map(|v| v.flatten_all().unwrap().to_vec1().unwrap())
        .collect();
    weights.push(var.flatten_all().unwrap().to_vec1().unwrap());
    (metrics, weights)
}

#[test]
fn a_killed_run_goes_on_to_the_same_bits() {
    let base = std::env::temp_dir().join(format!("simpatico-dpo-{}", std::process::id()));
    let (whole, expected) = small_run(&base.join("whole"), usize::MAX, false);
    small_run(&base.join("cut"), 5, false);
    let (resumed, got) = small_run(&base.join("cut"), usize::MAX, true);
    assert_eq!(expected, got);
    assert_eq!(
        (whole.loss, whole.num_tokens),
        (resumed.loss, resumed.num_tokens)
    );
    let lines = std::fs::read_to_string(base.join("cut/metrics.jsonl")).unwrap();
    assert_eq!(lines.lines().count(), 6);
    assert!(base.join("cut/metrics.svg").is_file());
    std::fs::remove_dir_all(base).unwrap();
}

#[test]
fn reference_log_probabilities_are_computed_once() {
    let folder = std::env::temp_dir().join(format!("simpatico-ref-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let model = tiny();
    let start = adapter(&model, "sft_adapter");
    let groups = trl_groups();
    let runs = std::cell::Cell::new(0);
    let compute = |adapter: &Adapter| {
        let told = |_, _| {
            runs.set(runs.get() + 1);
            ControlFlow::Continue(())
        };
        reference_logps(&model, Some(adapter), &groups, Some(&folder), told).unwrap()
    };
    let first = compute(&start);
    assert_eq!(runs.get(), groups.len());
    assert_eq!(compute(&start), first);
    assert_eq!(runs.get(), groups.len(), "the second call computed again");
    compute(&adapter(&model, "dpo_adapter"));
    assert_eq!(
        runs.get(),
        2 * groups.len(),
        "another adapter has its own numbers"
    );
    std::fs::remove_dir_all(folder).unwrap();
}

/// A fresh run that nobody watches.
fn unwatched(folder: &Path) -> Journal<'static> {
    Journal {
        folder: folder.to_path_buf(),
        resume: false,
        progress: Box::new(|_| ControlFlow::Continue(())),
    }
}

#[test]
fn fine_tuning_lowers_the_loss() {
    let folder = std::env::temp_dir().join(format!("simpatico-sft-{}", std::process::id()));
    let model = tiny();
    let trained = adapter(&model, "sft_adapter").trainable().unwrap();
    let groups: Vec<SftGroup> = trl_groups().iter().map(preferred).collect();
    let options = SftOptions {
        lr: 1e-2,
        steps: 12,
        groups: 8,
        warmup: 1,
        ..SftOptions::default()
    };
    let last = train_sft(
        &model,
        &trained,
        None,
        &groups,
        &options,
        unwatched(&folder),
    )
    .unwrap();
    assert!(last.loss < 4.05, "{}", last.loss); // ln 64 = 4.16 at first
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn what_a_soft_prompt_says_can_be_learnt_and_is_unknown_without_it() {
    let model = tiny();
    // One prompt, and two users who are to be answered differently, each in one token.
    let group = |token: u32| SftGroup {
        prompt: vec![5, 6, 7],
        completions: vec![vec![token]],
    };
    let groups = vec![group(20), group(40)];
    let config = SoftPromptConfig {
        embedding: 2,
        inner: 4,
        tokens: 8,
        hidden: 32,
        scale: 1.0,
        normalize: true,
        bounded: true,
        everyone: None,
    };
    let (soft, params) = SoftPrompt::fresh(config, 3, &Device::Cpu).unwrap();
    let before = params.vars()[0].1.as_tensor().copy().unwrap();
    let embeddings = Tensor::new(&[[1f32, 0.0], [-1.0, 0.5]], &Device::Cpu).unwrap();
    let learnt = |reading: Option<&Reading>| {
        let folder = tempfile::tempdir().unwrap();
        let trained = adapter(&model, "sft_adapter").trainable().unwrap();
        let options = SftOptions {
            lr: 3e-2,
            steps: 150,
            groups: 2,
            warmup: 1,
            ..SftOptions::default()
        };
        let journal = unwatched(folder.path());
        let last = train_sft(&model, &trained, reading, &groups, &options, journal);
        last.unwrap().loss
    };
    let reading = Reading {
        soft: &soft,
        embeddings: &embeddings,
        users: vec![0, 1],
    };
    let (with, without) = (learnt(Some(&reading)), learnt(None));
    // The same steps: who cannot tell the two apart can only make both likelier.
    assert!(with + 0.1 < without, "{with} with, {without} without");
    let after = params.vars()[0].1.as_tensor().copy().unwrap();
    let apart = (before - after).unwrap().abs().unwrap().max_all().unwrap();
    assert_eq!(apart.to_scalar::<f32>().unwrap(), 0.0, "it stays as it is");
}
