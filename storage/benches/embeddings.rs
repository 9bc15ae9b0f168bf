//! What embeddings cost while events arrive.
//!
//! Workload W2 (100,000 users, 5,000 attributes, 50 edges a user, seed 7), models of 256 and
//! of 1,024 numbers, users without and with learned vectors. Prints medians; the full
//! recomputation in the same run is the baseline. Weights and features are random: speed does
//! not depend on them. `--small` runs on W1, `--only 256` one model.
//!
//! ```text
//! cargo bench -p simpatico-storage --bench embeddings
//! ```

use safetensors::tensor::{Dtype, TensorView, serialize};
use simpatico_schema::random::Philox;
use simpatico_schema::{Polarity, Sign};
use simpatico_storage::graph::{AttributeId, Change, Graph, Register, UserId};
use simpatico_storage::sage::{Encoder, EncoderConfig, Relations, Sage};
use simpatico_storage::workload::Workload;
use std::collections::HashMap;
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const SEED: u64 = 7;

fn main() {
    let flags: Vec<String> = std::env::args().collect();
    let has = |flag: &str| flags.iter().any(|f| f == flag);
    let workload = if has("--small") {
        Workload::w1(SEED)
    } else {
        Workload::w2(SEED)
    };
    let only = flags
        .iter()
        .position(|f| f == "--only")
        .and_then(|i| flags.get(i + 1));
    println!(
        "embeddings: {} users x {} attributes x {} edges, seed {SEED}, {} threads at hand",
        workload.users,
        workload.attributes,
        workload.edges_per_user,
        std::thread::available_parallelism().map_or(1, |n| n.get())
    );
    let graph = build_graph(&workload);
    for (dims, learned) in [
        ([384, 0, 256, 256], false),
        ([384, 384, 256, 256], true),
        ([4096, 0, 1024, 1024], false),
        ([4096, 64, 1024, 1024], true),
    ] {
        if only.is_none_or(|only| *only == dims[3].to_string()) {
            measure(&workload, &graph, dims, learned);
        }
    }
}

fn build_graph(workload: &Workload) -> Graph {
    let mut graph = Graph::new();
    for attribute in 0..workload.attributes {
        graph.add_attribute(&workload.attribute_name(attribute));
    }
    let mut edges = Vec::new();
    for user in 0..workload.users {
        let id = graph.add_user(&workload.user_name(user));
        edges.clear();
        workload.user_edges(user, &mut edges);
        let registers = edges.iter().map(|&(attribute, sign)| {
            let polarity = sign.polarity();
            let register = Register {
                polarity,
                at: 0,
                id: "",
            };
            (id, AttributeId(attribute), register)
        });
        graph.set_batch(&registers.collect::<Vec<_>>());
    }
    graph
}

fn encoder(dims: [usize; 4]) -> Arc<Encoder> {
    let [in_dim_attribute, in_dim_user, hidden, out] = dims;
    let config = EncoderConfig {
        version: 1,
        in_dim_attribute,
        in_dim_user,
        hidden,
        out,
        relations: Relations::Separated,
    };
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    for name in Relations::Separated.names() {
        for (layer, from, to, rows) in [
            (
                format!("c1.user__{name}__attr"),
                in_dim_user,
                in_dim_attribute,
                hidden,
            ),
            (
                format!("c1.attr__rev_{name}__user"),
                in_dim_attribute,
                in_dim_user,
                hidden,
            ),
            (format!("c2.attr__rev_{name}__user"), hidden, hidden, out),
        ] {
            for (tensor, shape) in [
                ("lin_l.weight", vec![rows, from]),
                ("lin_l.bias", vec![rows]),
                ("lin_r.weight", vec![rows, to]),
            ] {
                let mut random = Philox::new(SEED, tensors.len() as u64);
                let scale = 1.0 / (from.max(1) as f32).sqrt();
                let count = shape.iter().product();
                let numbers = (0..count).map(|_| (random.uniform() - 0.5) * scale);
                let bytes = numbers.flat_map(f32::to_le_bytes).collect();
                tensors.push((format!("{layer}.{tensor}"), shape, bytes));
            }
        }
    }
    let views = tensors.iter().filter(|(_, shape, _)| !shape.contains(&0));
    let views = views.map(|(name, shape, bytes)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes).expect("shape and bytes fit");
        (name.clone(), view)
    });
    let json = serde_json::to_string(&config).expect("a config is JSON");
    let metadata = HashMap::from([("simpatico".to_string(), json)]);
    let bytes = serialize(views, Some(metadata)).expect("tensors serialise");
    Arc::new(Encoder::from_bytes(&bytes).expect("the encoder is whole"))
}

fn measure(workload: &Workload, graph: &Graph, dims: [usize; 4], learned: bool) {
    let encoder = encoder(dims);
    let mut graph = graph.clone();
    let mut sage = Sage::with_cache(encoder.clone(), 600 << 20);
    println!(
        "\n-- {} -> {} -> {}, users {} --",
        dims[0],
        dims[2],
        dims[3],
        if learned {
            "with learned vectors"
        } else {
            "without vectors of their own"
        }
    );
    let mut random = Philox::new(SEED, 1 << 20);
    let mut draw = |n: u32, dim: usize| -> Vec<Vec<f32>> {
        let mut vector = || (0..dim).map(|_| random.uniform() - 0.5).collect();
        (0..n).map(|_| vector()).collect()
    };
    let features = draw(workload.attributes, dims[0]);
    let vectors = draw(if learned { workload.users } else { 0 }, dims[1]);
    let started = Instant::now();
    let features: Vec<_> = (0..).map(AttributeId).zip(&features).collect();
    let features: Vec<_> = features.iter().map(|(a, f)| (*a, f.as_slice())).collect();
    sage.set_attribute_features(&features, 2)
        .expect("the features fit");
    println!("attribute features set: {:.2?}", started.elapsed());
    let started = Instant::now();
    let vectors: Vec<_> = (0..).map(UserId).zip(&vectors).collect();
    let vectors: Vec<_> = vectors.iter().map(|(u, f)| (*u, f.as_slice())).collect();
    sage.set_user_features(&vectors, |_, _| (), 2)
        .expect("the features fit");
    println!("users' vectors set: {:.2?}", started.elapsed());
    let started = Instant::now();
    let posting = |attribute, sign| graph.posting(attribute, sign);
    let all = (0..workload.users).map(UserId);
    sage.load_edges(all, workload.attributes, posting, 2);
    println!("edges taken in: {:.2?}", started.elapsed());

    // The large model's baseline takes minutes: a tenth of the users stands for all.
    let share = if dims[3] > 512 { 10 } else { 1 };
    let users: Vec<_> = (0..workload.users / share).map(UserId).collect();
    let edges_of = |user: UserId, to: &mut Vec<(AttributeId, Sign)>| to.extend(graph.edges(user));
    let started = Instant::now();
    let all = sage.embeddings(&users, edges_of, 2);
    let full = started.elapsed() * share;
    println!(
        "baseline, everything recomputed, 2 threads: {full:.2?} (measured on 1/{share} of the users)"
    );
    drop(black_box(all));
    let started = Instant::now();
    drop(black_box(sage.embeddings(&users, edges_of, 2)));
    println!("those from the cache: {:.2?}", started.elapsed());
    let started = Instant::now();
    black_box(sage.top_by_cosine(UserId(3), &users, 10, edges_of, |a, b| a.cmp(&b), 2));
    println!(
        "top 10 of all by cosine, exact, from the cache: {:.2?}",
        started.elapsed()
    );

    absorb(workload, &mut graph.clone(), &mut sage.clone());
    one_event_between_reads(workload, &mut graph, &mut sage, full);
    full_stream(workload, graph, sage);
}

/// A change of a random edge: a like, a dislike or a removal.
fn change(
    workload: &Workload,
    graph: &mut Graph,
    at: i64,
    random: &mut Philox,
) -> (UserId, AttributeId, Option<Sign>, Option<Sign>) {
    let user = UserId(random.below(workload.users));
    let attribute = match (random.below(3), graph.edges(user).next()) {
        (0, Some((attribute, _))) => attribute,
        _ => AttributeId(random.below(workload.attributes)),
    };
    let polarity = Polarity::ALL[random.below(4) as usize];
    let register = Register {
        polarity,
        at,
        id: "",
    };
    match graph.set(user, attribute, register) {
        Change::Applied { old, new } => (user, attribute, old, new),
        Change::Unchanged => (user, attribute, None, None),
    }
}

/// Events as fast as they go, the cache full, a snapshot taken after every hundred.
fn absorb(workload: &Workload, graph: &mut Graph, sage: &mut Sage) {
    let mut random = Philox::new(SEED, 1 << 21);
    let events: Vec<_> = (1..=400_000)
        .map(|at| change(workload, graph, at, &mut random))
        .collect();
    let mut rates = Vec::new();
    let mut snapshot = sage.clone();
    for chunk in events.chunks(20_000) {
        let started = Instant::now();
        for (i, &(user, attribute, old, new)) in chunk.iter().enumerate() {
            sage.on_edge(user, attribute, old, new);
            if i % 100 == 0 {
                snapshot = sage.clone();
            }
        }
        rates.push(chunk.len() as f64 / started.elapsed().as_secs_f64());
    }
    black_box(&snapshot);
    rates.sort_by(f64::total_cmp);
    println!(
        "events absorbed, a snapshot every 100: {:.0} k/s median of {} runs of 20,000",
        rates[rates.len() / 2] / 1e3,
        rates.len()
    );
}

/// Read, event, read, event: the user of the event, and somebody else.
fn one_event_between_reads(
    workload: &Workload,
    graph: &mut Graph,
    sage: &mut Sage,
    full: Duration,
) {
    let mut random = Philox::new(SEED, 1 << 22);
    let (mut own, mut other) = (Vec::new(), Vec::new());
    let mut edges = Vec::new();
    for at in 1_000_000..1_003_000 {
        let (user, attribute, old, new) = change(workload, graph, at, &mut random);
        sage.on_edge(user, attribute, old, new);
        let mut read = |user: UserId| {
            let started = Instant::now();
            edges.clear();
            edges.extend(graph.edges(user));
            black_box(sage.embedding(user, &edges));
            started.elapsed()
        };
        own.push(read(user));
        other.push(read(UserId(random.below(workload.users))));
    }
    let (own_median, own_p99) = median_and_p99(own);
    let (other_median, other_p99) = median_and_p99(other);
    println!(
        "a read after one event, of its user: median {own_median:.1?}, p99 {own_p99:.1?} \
         ({:.0} times less than the baseline)",
        full.as_secs_f64() / own_median.as_secs_f64()
    );
    println!("a read after one event, of anybody: median {other_median:.1?}, p99 {other_p99:.1?}");
}

/// One thread writes as fast as it can and publishes a snapshot after every hundred events;
/// this one reads random users of the newest snapshot.
fn full_stream(workload: &Workload, graph: Graph, sage: Sage) {
    let published = Mutex::new((graph.clone(), sage.clone()));
    let stop = AtomicBool::new(false);
    let newest = || {
        let published = published.lock().expect("nobody panicked");
        (published.0.clone(), published.1.clone())
    };
    let (mut times, written) = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let (mut graph, mut sage) = (graph, sage);
            let mut random = Philox::new(SEED, 1 << 23);
            let started = Instant::now();
            let mut at = 2_000_000;
            while !stop.load(Ordering::Relaxed) {
                for _ in 0..100 {
                    let (user, attribute, old, new) = change(workload, &mut graph, at, &mut random);
                    sage.on_edge(user, attribute, old, new);
                    at += 1;
                }
                *published.lock().expect("nobody panicked") = (graph.clone(), sage.clone());
            }
            f64::from(u32::try_from(at - 2_000_000).unwrap_or(u32::MAX))
                / started.elapsed().as_secs_f64()
        });
        let mut random = Philox::new(SEED, 1 << 24);
        let (mut times, mut edges) = (Vec::new(), Vec::new());
        let started = Instant::now();
        while started.elapsed() < Duration::from_secs(3) {
            let (graph, sage) = newest();
            let user = UserId(random.below(workload.users));
            let started = Instant::now();
            edges.clear();
            edges.extend(graph.edges(user));
            black_box(sage.embedding(user, &edges));
            times.push(started.elapsed());
        }
        stop.store(true, Ordering::Relaxed);
        (times, writer.join().expect("the writer did not panic"))
    });
    times.truncate(times.len().max(1));
    let reads = times.len();
    let (median, p99) = median_and_p99(times);
    println!(
        "under a full stream of {:.0} k events/s (index and embeddings): {reads} reads, \
         median {median:.1?}, p99 {p99:.1?}",
        written / 1e3
    );
}

fn median_and_p99(mut times: Vec<Duration>) -> (Duration, Duration) {
    times.sort_unstable();
    (times[times.len() / 2], times[times.len() * 99 / 100])
}
