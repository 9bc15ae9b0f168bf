//! What `generate` promises, tested.

use super::*;
use crate::lm::Precision;
use crate::weights::Weights;
use candle_core::{DType, Device};
use std::path::PathBuf;

fn golden(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/golden/lm")
        .join(file)
}

/// A tiny checkpoint with the word-level tokenizer; it never ends its turn by itself.
fn tiny(name: &str) -> LanguageModel {
    let folder = std::env::temp_dir().join(format!(
        "simpatico-lm-{name}-{}-{:?}",
        std::process::id(),
        std::thread::current().id()
    ));
    std::fs::create_dir_all(&folder).unwrap();
    for file in [
        format!("{name}/config.json"),
        format!("{name}/model.safetensors"),
        "tok/tokenizer.json".into(),
        "tok/tokenizer_config.json".into(),
    ] {
        let from = golden(&file);
        std::fs::copy(&from, folder.join(from.file_name().unwrap())).unwrap();
    }
    let model = LanguageModel::open(&folder, Precision::Dense(DType::F32), &Device::Cpu);
    std::fs::remove_dir_all(&folder).unwrap();
    let mut model = model.unwrap();
    model.stop.clear();
    model
}

fn whole(model: &LanguageModel, prompt: &Prompt, options: &Options) -> Answer {
    generate(model, prompt, None, options, |_| ControlFlow::Continue(())).unwrap()
}

#[test]
fn greedy_tokens_equal_those_of_transformers() {
    let all = Weights::open(&golden("expected.safetensors")).unwrap();
    let ids = |name: &str| -> Vec<u32> {
        let t = all.get_any(name, DType::I64, &Device::Cpu).unwrap();
        let t = t.flatten_all().unwrap().to_vec1::<i64>().unwrap();
        t.into_iter().map(|i| i as u32).collect()
    };
    for name in ["qwen2", "llama"] {
        let model = tiny(name);
        let answer = whole(&model, &Prompt::tokens(ids("ids")), &Options::greedy(12));
        assert_eq!(answer.tokens, ids(&format!("{name}.greedy")), "{name}");
        assert_eq!(answer.ended, Ended::Length);
    }
}

#[test]
fn a_batch_gives_each_prompt_what_it_gets_alone() {
    let model = tiny("llama");
    let soft = Tensor::from_vec(Philox::new(1, 0).normals(3 * 32), (3, 32), &Device::Cpu);
    let prompts: Vec<Prompt> = [vec![1, 2, 3], vec![7], vec![9, 8, 7, 6, 5, 4]]
        .into_iter()
        .enumerate()
        .map(|(i, ids)| Prompt {
            soft: (i == 1).then(|| soft.as_ref().unwrap().clone()),
            ids,
            stream: i as u64,
        })
        .collect();
    let (greedy, lively) = (Sampling::greedy(), Sampling::lively(5));
    for (sampling, emphasis) in [
        (greedy.clone(), 1.0),
        (lively.clone(), 1.0),
        (greedy, 3.0),
        (lively, 3.0),
    ] {
        let options = Options {
            sampling,
            emphasis,
            ..Options::greedy(10)
        };
        let go_on = || ControlFlow::Continue(());
        let batch = generate_batch(&model, &prompts, None, &options, go_on).unwrap();
        for (prompt, answer) in prompts.iter().zip(&batch) {
            assert_eq!(answer, &whole(&model, prompt, &options));
        }
    }
}

#[test]
fn what_was_read_once_is_answered_again_as_if_read_anew() {
    let model = tiny("llama");
    let soft = Tensor::from_vec(Philox::new(1, 0).normals(3 * 32), (3, 32), &Device::Cpu).unwrap();
    let prompts = [
        Prompt::tokens(vec![1, 2, 3]),
        Prompt {
            soft: Some(soft),
            ..Prompt::tokens(vec![7, 4])
        },
        Prompt::tokens(vec![1, 2, 6, 5]),
    ];
    let go_on = &mut || ControlFlow::Continue(());
    for emphasis in [1.0, 2.0] {
        let most = Options {
            emphasis,
            ..Options::greedy(12)
        };
        let mut read = Read::new(&model, &prompts, None, &most, go_on).unwrap();
        // Longer and shorter, warm and cold, some and all, in any order.
        for (which, length) in [
            (vec![(1, 3), (0, 3)], 12),
            (vec![(0, 4), (1, 4), (2, 4)], 5),
            (vec![(2, 0), (1, 0)], 12),
        ] {
            let options = Options {
                max_tokens: length,
                sampling: Sampling::lively(8),
                ..most.clone()
            };
            let answers = read.answer(&which, &options, go_on).unwrap();
            for ((i, stream), answer) in which.into_iter().zip(answers) {
                let prompt = Prompt {
                    stream,
                    ..prompts[i].clone()
                };
                assert_eq!(answer, whole(&model, &prompt, &options), "prompt {i}");
            }
        }
        assert_eq!(read.answer(&[], &most, go_on).unwrap(), []);
        for wrong in [
            Options::greedy(13),
            Options {
                emphasis: 5.0,
                ..most.clone()
            },
        ] {
            let refused = read.answer(&[(0, 0)], &wrong, go_on).unwrap_err();
            assert!(refused.to_string().contains("at most 12"), "{refused}");
        }
    }
}

#[test]
fn a_token_is_drawn_as_from_all_of_them_in_order() {
    let mut random = Philox::new(4, 0);
    for round in 0..60 {
        // Flat ones, where the draw reaches far, and peaked ones, with equals among them.
        let spread = [0.05, 1.0, 6.0][round % 3];
        let logits: Vec<f32> = random.normals(3_000);
        let logits: Vec<f32> = logits.iter().map(|x| (x * 8.0).round() * spread).collect();
        let (top_p, temperature) = ([0.3, 0.9, 1.0][round / 3 % 3], 0.8f32);
        let sampling = Sampling {
            temperature,
            top_p,
            ..Sampling::lively(0)
        };
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
        let weight = |i: &usize| f64::exp(f64::from(logits[*i] - logits[order[0]]) / 0.8);
        let total: f64 = order.iter().map(weight).sum();
        let mut kept = 0.0;
        let reach = order.iter().position(|i| {
            kept += weight(i);
            kept >= f64::from(top_p) * total * (1.0 - 1e-12)
        });
        let reach = reach.unwrap_or(order.len() - 1);
        let seed = Philox::new(9, round as u64);
        let drawn = choose(&mut logits.clone(), &sampling, &[], &mut seed.clone()).unwrap();
        let place = order.iter().position(|i| *i == drawn as usize).unwrap();
        assert!(
            place <= reach,
            "round {round}: place {place}, reach {reach}"
        );
        // The draw falls within its token's share of what is kept.
        let upto = |n: usize| order[..n].iter().map(weight).sum::<f64>() / kept;
        let share = seed.clone().uniform_f64();
        let (low, high) = (upto(place) - 1e-6, upto(place + 1) + 1e-6);
        assert!(
            (low..=high).contains(&share),
            "round {round}: {share}, {low} to {high}"
        );
    }
}

#[test]
fn emphasis_moves_what_the_soft_prompt_moves() {
    let of = |emphasis: f32| {
        let options = Options {
            emphasis,
            ..Options::greedy(1)
        };
        // By itself the first token is likeliest; the soft prompt raised the second; the last
        // is out of the question.
        let mut logits = vec![2.0, 1.5, 2.0f32 - 2.4];
        options.emphasise(&mut logits, &[2.0, 0.5, -9.0]);
        logits
    };
    assert_eq!(of(1.0), [2.0, 1.5, f32::NEG_INFINITY]);
    assert_eq!(of(2.0), [2.0, 2.5, f32::NEG_INFINITY]);
    assert_eq!(of(0.0), [2.0, 0.5, f32::NEG_INFINITY]);

    let model = tiny("qwen2");
    let soft = Tensor::from_vec(Philox::new(1, 0).normals(3 * 32), (3, 32), &Device::Cpu).unwrap();
    let prompt = Prompt {
        soft: Some(soft),
        ..Prompt::tokens(vec![4, 5, 6])
    };
    let written = |prompt: &Prompt, emphasis: f32| {
        let options = Options {
            emphasis,
            ..Options::greedy(12)
        };
        whole(&model, prompt, &options).tokens
    };
    let by_itself = written(&prompt, 1.0);
    assert!((2..=8).any(|e| written(&prompt, e as f32) != by_itself));
    // Where nothing is soft there is nothing to emphasise.
    let plain = Prompt::tokens(vec![4, 5, 6]);
    assert_eq!(written(&plain, 4.0), written(&plain, 1.0));
    let wrong = Options {
        emphasis: f32::NAN,
        ..Options::greedy(1)
    };
    let refused = generate(&model, &plain, None, &wrong, |_| ControlFlow::Continue(()));
    assert!(refused.unwrap_err().to_string().contains("0 to 10"));
}

#[test]
fn what_prompts_begin_with_is_read_once_and_changes_nothing() {
    let model = tiny("qwen2");
    let prompts: Vec<Prompt> = [vec![1, 2, 3, 4], vec![1, 2, 3], vec![1, 2, 3, 9, 9]]
        .into_iter()
        .map(Prompt::tokens)
        .collect();
    assert_eq!(shared_beginning(prompts.iter().map(|p| &p.ids)), 2);
    let options = Options::greedy(6);
    let go_on = || ControlFlow::Continue(());
    let batch = generate_batch(&model, &prompts, None, &options, go_on).unwrap();
    for (prompt, answer) in prompts.iter().zip(&batch) {
        assert_eq!(answer, &whole(&model, prompt, &options));
    }
    let mut asked = 0;
    let stop_later = || {
        asked += 1;
        match asked {
            5 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    };
    let stopped = generate_batch(&model, &prompts, None, &options, stop_later);
    assert!(matches!(stopped, Err(Error::Cancelled)), "{stopped:?}");
    assert_eq!(asked, 5);
}

#[test]
fn the_same_seed_gives_the_same_answer_and_another_seed_another() {
    let model = tiny("llama");
    let answer = |seed: u64, stream: u64| {
        let sampling = Sampling {
            temperature: 1.5,
            ..Sampling::lively(seed)
        };
        let options = Options {
            sampling,
            ..Options::greedy(16)
        };
        let prompt = Prompt {
            stream,
            ..Prompt::tokens(vec![1, 2, 3])
        };
        whole(&model, &prompt, &options).tokens
    };
    assert_eq!(answer(1, 0), answer(1, 0));
    assert_ne!(answer(1, 0), answer(2, 0));
    assert_ne!(answer(1, 0), answer(1, 1));
}

#[test]
fn pieces_make_up_the_text_and_stop_texts_are_never_told() {
    let model = tiny("qwen2");
    let prompt = Prompt::tokens(vec![3, 14, 15, 9]);
    let plain = whole(&model, &prompt, &Options::greedy(12));
    let words: Vec<&str> = plain.text.split(' ').collect();
    let stop = format!("{} {}", words[4], words[5]);
    let options = Options {
        stop: vec![stop.clone()],
        ..Options::greedy(12)
    };
    let mut told = String::new();
    let answer = generate(&model, &prompt, None, &options, |s| {
        told.push_str(s);
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(told, answer.text);
    assert!(!told.contains(&stop), "{told}");
    assert_eq!(answer.ended, Ended::Stop);
    assert!(plain.text.starts_with(&answer.text));
}

#[test]
fn a_broken_callback_cancels_at_once() {
    let model = tiny("qwen2");
    let mut calls = 0;
    let cancelled = generate(
        &model,
        &Prompt::tokens(vec![1]),
        None,
        &Options::greedy(50),
        |_| {
            calls += 1;
            if calls == 3 {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        },
    );
    assert!(matches!(cancelled, Err(Error::Cancelled)) && calls == 3);
}

#[test]
fn the_turn_ends_at_the_models_own_token() {
    let mut model = tiny("qwen2");
    let prompt = Prompt::tokens(vec![3, 14, 15, 9]);
    let plain = whole(&model, &prompt, &Options::greedy(12));
    model.stop = vec![plain.tokens[3]];
    let first = plain
        .tokens
        .iter()
        .position(|t| *t == plain.tokens[3])
        .unwrap();
    let answer = whole(&model, &prompt, &Options::greedy(12));
    assert_eq!(answer.tokens, plain.tokens[..first]);
    assert_eq!(answer.ended, Ended::Turn);
}

#[test]
fn impossible_requests_say_why() {
    let model = tiny("llama");
    let fail = |prompt: &Prompt, options: &Options| {
        generate(&model, prompt, None, options, |_| ControlFlow::Continue(()))
            .unwrap_err()
            .to_string()
    };
    let options = Options::greedy(5);
    assert!(fail(&Prompt::tokens(vec![]), &options).contains("empty"));
    assert!(fail(&Prompt::tokens(vec![1; 126]), &options).contains("shorten"));
    assert!(fail(&Prompt::tokens(vec![64]), &options).contains("vocabulary"));
    let mut hot = options.clone();
    hot.sampling.temperature = f32::NAN;
    assert!(fail(&Prompt::tokens(vec![1]), &hot).contains("temperature"));
}

#[test]
fn draws_follow_the_distribution_that_the_settings_leave() {
    let logits = [2.0f32, 1.0, 0.0, -1.0];
    let draw = |s: &Sampling, n: usize| {
        let mut rng = Philox::new(3, 0);
        let mut counts = [0usize; 4];
        for _ in 0..n {
            counts[choose(&mut logits.to_vec(), s, &[], &mut rng).unwrap() as usize] += 1;
        }
        counts
    };
    let plain = Sampling {
        temperature: 1.0,
        ..Sampling::greedy()
    };
    let counts = draw(&plain, 20_000);
    let total: f32 = logits.iter().map(|x| x.exp()).sum();
    for (count, logit) in counts.iter().zip(logits) {
        let expected = logit.exp() / total;
        assert!((*count as f32 / 2e4 - expected).abs() < 0.015, "{counts:?}");
    }
    let top_k = Sampling {
        top_k: Some(2),
        ..plain.clone()
    };
    assert_eq!(draw(&top_k, 500)[2..], [0, 0]);
    // e^2 / total = 0.64 < 0.7 <= 0.88
    let top_p = Sampling {
        top_p: 0.7,
        ..plain.clone()
    };
    let counts = draw(&top_p, 500);
    assert!(counts[1] > 0 && counts[2..] == [0, 0], "{counts:?}");
    let penalty = Sampling {
        repetition_penalty: 4.0,
        ..Sampling::greedy()
    };
    let next = choose(
        &mut logits.to_vec(),
        &penalty,
        &[0, 0, 3],
        &mut Philox::new(0, 0),
    );
    assert_eq!(next.unwrap(), 1);
    assert!(choose(&mut [0.0, f32::NAN], &plain, &[], &mut Philox::new(0, 0)).is_err());
}
