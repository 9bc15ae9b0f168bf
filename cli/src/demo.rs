//! `simpatico demo`: the whole job on the spot, ending with one page to look at.
//!
//! A synthetic community and a live stream go into a fresh store; newcomers with three likes
//! each find their neighbours; instructions are written for them and carried out on pictures
//! that no training has seen; they answer, and the next edit follows. Nothing on the page is
//! prepared: every figure and picture comes from this run.

mod page;

use crate::edit_commands::{commit, open_engine};
use crate::learn_commands::prepare_embeddings;
use crate::model_commands::pull_models;
use crate::output::Output;
use crate::{CANCELLED, Common, Outcome, cancelled};
use anyhow::{Context, Result, bail};
use clap::Args;
use page::{Cell, Dot, Grid, Page, Round, UserCard};
use simpatico_engine::bundle::packages::{Model, Source as ModelSource};
use simpatico_engine::bundle::{Bundle, Location};
use simpatico_engine::canny::canny;
use simpatico_engine::edit::{Answer, Edit, EditRequest, Hooks, Source, feedback, record_of};
use simpatico_engine::engine::Engine;
use simpatico_engine::picture::{Picture, write_whole};
use simpatico_engine::render::artwork::cut_outs;
use simpatico_engine::render::{Color, Object, Scene};
use simpatico_engine::synth::{self, Synth, SynthOptions};
use simpatico_engine::vocabulary::{self, Category};
use simpatico_schema::edit::EditSettings;
use simpatico_schema::{Event, OverlapMode, Polarity};
use simpatico_storage::{Options, Store};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// How many users the community has, and how many pictures are edited for each newcomer.
const COMMUNITY: usize = 1000;
const PICTURES: usize = 12;
/// Likes after which the cold start is looked at.
const COLD_START: [usize; 6] = [0, 1, 2, 4, 8, 16];

#[derive(Args)]
pub struct DemoArgs {
    /// Where the pictures, the page and (unless --store names another) the store go; must not
    /// hold a demo already
    #[arg(long, default_value = "simpatico.demo", value_name = "DIR")]
    out: PathBuf,
    /// Edit the pictures in this folder instead of drawn ones
    #[arg(long, value_name = "DIR")]
    photos: Option<PathBuf>,
}

/// A picture to be edited and what it shows.
struct Subject {
    caption: String,
    picture: Picture,
}

pub fn run(args: &DemoArgs, common: &Common, output: &Output) -> Result<Outcome> {
    let folder = match common.store_given {
        true => common.store.clone(),
        false => args.out.join("store"),
    };
    if Store::exists(&folder) {
        bail!(
            "{}: a store is there already; remove it or give another --out or --store",
            folder.display()
        );
    }
    let mut page = Page::default();
    let subjects = subjects(
        args.photos.as_deref(),
        &Bundle::find(&common.bundle)?,
        common.seed,
    )?;
    fetch_models(common, output)?;

    let store = Store::open(&folder, Options::default())?;
    let community = ingest(&store, common, output, &mut page)?;
    timed(&mut page, "text vectors and embeddings", || {
        prepare_embeddings(&store, common, output)
    })?;
    let newcomers = newcomers(&store, &community, &mut page)?;
    place_community(&store, &community, &newcomers, &mut page)?;
    cold_start(&community, &mut page)?;

    let engine = open_engine(common)?;
    edit_everything(
        &engine, &store, &newcomers, &subjects, common, output, &mut page,
    )?;
    answer_and_edit_again(&engine, &store, &newcomers, &subjects[0], common, &mut page)?;

    page.run = format!(
        "{COMMUNITY} synthetic users, seed {}, {} cores, {}",
        common.seed,
        std::thread::available_parallelism().map_or(1, usize::from),
        simpatico_engine::engine::device_word(engine.device()),
    );
    let file = args.out.join("index.html");
    write_whole(&file, page::html(&page).as_bytes())?;
    store.close()?;
    let timings: BTreeMap<&str, f64> = page.timings.iter().map(|t| (t.0.as_str(), t.1)).collect();
    let answer = serde_json::json!({"page": file, "store": folder, "seconds": timings});
    output.answer(&answer, || format!("Look at {}", file.display()))?;
    Ok(Outcome::Done)
}

/// Runs one stage and writes down what it took.
fn timed<T>(page: &mut Page, stage: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    if cancelled() {
        bail!("interrupted");
    }
    let started = Instant::now();
    let value = work()?;
    page.timings
        .push((stage.into(), started.elapsed().as_secs_f64(), String::new()));
    Ok(value)
}

fn fetch_models(common: &Common, output: &Output) -> Result<()> {
    let needed = Bundle::find(&common.bundle)?.manifest.models;
    let models: Vec<&'static Model> = needed
        .iter()
        .filter_map(|name| Model::named(name))
        .collect();
    pull_models(&models, &ModelSource::Packages, &output.without_answers())
}

/// Half of the community in one load, half as a stream of single durable events.
fn ingest(store: &Store, common: &Common, output: &Output, page: &mut Page) -> Result<Synth> {
    let options = SynthOptions {
        users: COMMUNITY,
        seed: common.seed,
        ..SynthOptions::default()
    };
    let community = synth::generate(&options)?;
    let (load, stream) = community.events.split_at(community.events.len() / 2);
    let started = Instant::now();
    store.append(load)?;
    let rate = load.len() as f64 / started.elapsed().as_secs_f64();
    page.timings.push((
        "bulk load".into(),
        started.elapsed().as_secs_f64(),
        format!("{} events, {rate:.0} a second, durable", load.len()),
    ));
    let bar = output.bar(stream.len() as u64, "events");
    let started = Instant::now();
    std::thread::scope(|scope| {
        let appends: Vec<_> = stream
            .chunks(stream.len().div_ceil(32).max(1))
            .map(|part| {
                let bar = &bar;
                scope.spawn(move || {
                    part.iter().try_for_each(|event| {
                        bar.inc(1);
                        store.append(std::slice::from_ref(event)).map(drop)
                    })
                })
            })
            .collect();
        appends
            .into_iter()
            .try_for_each(|thread| match thread.join() {
                Ok(result) => result.context("the live stream"),
                Err(_) => bail!("the live stream: a thread panicked"),
            })
    })?;
    bar.finish_and_clear();
    let rate = stream.len() as f64 / started.elapsed().as_secs_f64();
    output.note(format_args!(
        "live stream: {rate:.0} single durable events a second from 32 threads"
    ));
    page.timings.push((
        "live stream".into(),
        started.elapsed().as_secs_f64(),
        format!(
            "{} events one at a time from 32 threads, {rate:.0} a second, each durable",
            stream.len()
        ),
    ));
    Ok(community)
}

/// Whether the small picture model shows this clearly: what a thing is made of or painted in, and
/// what lies behind it. Things to be added, styles and light it hardly draws (its model card).
fn shown_clearly(like: &str) -> bool {
    vocabulary::find(like).is_some_and(|attribute| {
        let clear = matches!(
            attribute.category,
            Category::Color | Category::Material | Category::Pattern | Category::Background
        );
        clear && attribute.look.is_some()
    })
}

/// Four held-out users of different main taste, who say three of their likes: such as the small
/// picture model can show, since here the pictures are what is looked at.
fn newcomers(store: &Store, community: &Synth, page: &mut Page) -> Result<Vec<String>> {
    let mut names = Vec::new();
    let mut tastes: Vec<&str> = Vec::new();
    for user in &community.users {
        let Some((taste, _)) = user.clusters.first() else {
            continue;
        };
        let new = community.splits.held_out_users.contains(&user.user);
        let likes: Vec<&String> = user.likes.iter().filter(|l| shown_clearly(l)).collect();
        if !new || tastes.contains(&taste.as_str()) || likes.len() < 3 {
            continue;
        }
        tastes.push(taste);
        let events: Vec<Event> = likes
            .into_iter()
            .take(3)
            .map(|like| Event::new(&user.user, like, Polarity::Like))
            .collect();
        store.append(&events)?;
        let profile = store.snapshot().profile(&user.user, 5)?;
        let total: f64 = profile.neighbors.iter().map(|n| n.similarity).sum();
        page.users.push(UserCard {
            name: user.user.clone(),
            likes: profile.likes,
            dislikes: profile.dislikes,
            neighbors: profile
                .neighbors
                .iter()
                .map(|n| {
                    (
                        n.user.clone(),
                        n.overlap.unwrap_or(0),
                        n.similarity / total.max(1e-9),
                    )
                })
                .collect(),
            would_add: profile
                .suggestions
                .into_iter()
                .take(6)
                .map(|s| s.attribute)
                .collect(),
        });
        names.push(user.user.clone());
        if names.len() == 4 {
            break;
        }
    }
    Ok(names)
}

/// Everyone's place: the embeddings on their two widest directions.
fn place_community(
    store: &Store,
    community: &Synth,
    newcomers: &[String],
    page: &mut Page,
) -> Result<()> {
    let snapshot = store.snapshot();
    let mut rows: Vec<(usize, Option<String>, Vec<f32>)> = Vec::new();
    for user in &community.users {
        if !snapshot.has_user(&user.user) {
            continue;
        }
        let taste = user.clusters.first().map_or("", |c| c.0.as_str());
        let at = page
            .tastes
            .iter()
            .position(|t| t == taste)
            .unwrap_or_else(|| {
                page.tastes.push(taste.to_string());
                page.tastes.len() - 1
            });
        let name = newcomers.contains(&user.user).then(|| user.user.clone());
        rows.push((at, name, snapshot.embedding(&user.user)?.vector));
    }
    let places = two_widest(rows.iter().map(|r| r.2.as_slice()).collect());
    page.community = rows
        .into_iter()
        .zip(places)
        .map(|((taste, name, _), (x, y))| Dot { x, y, taste, name })
        .collect();
    Ok(())
}

/// The first two principal components of the rows, each scaled into -1..1 (power iteration).
fn two_widest(rows: Vec<&[f32]>) -> Vec<(f32, f32)> {
    let width = rows.first().map_or(0, |r| r.len());
    let mean: Vec<f32> = (0..width)
        .map(|c| rows.iter().map(|r| r[c]).sum::<f32>() / rows.len().max(1) as f32)
        .collect();
    let mut centred: Vec<Vec<f32>> = rows
        .iter()
        .map(|r| r.iter().zip(&mean).map(|(x, m)| x - m).collect())
        .collect();
    let mut axis = || -> Vec<f32> {
        let mut direction: Vec<f32> = (0..width).map(|c| 1.0 + c as f32 * 0.01).collect();
        for _ in 0..40 {
            let mut next = vec![0f32; width];
            for row in &centred {
                let along: f32 = row.iter().zip(&direction).map(|(a, b)| a * b).sum();
                next.iter_mut().zip(row).for_each(|(n, x)| *n += along * x);
            }
            let length = next.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-20);
            direction = next.iter().map(|x| x / length).collect();
        }
        let along: Vec<f32> = centred
            .iter_mut()
            .map(|row| {
                let along: f32 = row.iter().zip(&direction).map(|(a, b)| a * b).sum();
                row.iter_mut()
                    .zip(&direction)
                    .for_each(|(x, d)| *x -= along * d);
                along
            })
            .collect();
        let most = along.iter().fold(1e-20f32, |m, x| m.max(x.abs()));
        along.iter().map(|x| x / most).collect()
    };
    let (x, y) = (axis(), axis());
    x.into_iter().zip(y).collect()
}

/// How soon held-out users find their like: the share of ten neighbours with the same main
/// taste after so many of their likes, in a store of its own that is thrown away.
fn cold_start(community: &Synth, page: &mut Page) -> Result<()> {
    let taste: BTreeMap<&str, &str> = community
        .users
        .iter()
        .filter_map(|u| Some((u.user.as_str(), u.clusters.first()?.0.as_str())))
        .collect();
    let folder = std::env::temp_dir().join(format!("simpatico-cold-start-{}", std::process::id()));
    let store = Store::open(
        &folder,
        Options {
            mirror: false,
            ..Options::default()
        },
    )?;
    store.append(&community.events)?;
    for likes in COLD_START {
        let (mut same, mut chance, mut asked) = (0.0, 0.0, 0);
        for user in community
            .users
            .iter()
            .filter(|u| community.splits.held_out_users.contains(&u.user))
        {
            let name = format!("{}-{likes}", user.user);
            let events: Vec<Event> = user
                .likes
                .iter()
                .take(likes)
                .map(|l| Event::new(&name, l, Polarity::Like))
                .collect();
            let Some(own) = taste
                .get(user.user.as_str())
                .filter(|_| events.len() == likes)
            else {
                continue;
            };
            let by_chance =
                taste.values().filter(|t| *t == own).count() as f64 / taste.len() as f64;
            chance += by_chance;
            asked += 1;
            if likes == 0 {
                same += by_chance; // Nobody is like somebody who has said nothing.
                continue;
            }
            store.append(&events)?;
            let neighbors = store
                .snapshot()
                .similar(&name, 10, OverlapMode::Agreeing)?
                .neighbors;
            let alike = neighbors
                .iter()
                .filter(|n| taste.get(n.user.as_str()) == Some(own))
                .count();
            same += alike as f64 / neighbors.len().max(1) as f64;
            store.forget(&name)?;
        }
        if asked > 0 {
            page.cold_start
                .push((likes, same / f64::from(asked), chance / f64::from(asked)));
        }
    }
    store.close()?;
    std::fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())
}

/// The pictures: the caller's own, or artwork and drawings that no training has seen.
fn subjects(photos: Option<&Path>, bundle: &Bundle, seed: u64) -> Result<Vec<Subject>> {
    if let Some(folder) = photos {
        let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
            .with_context(|| folder.display().to_string())?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.is_file())
            .collect();
        files.sort();
        let mut subjects = Vec::new();
        for file in files {
            match Source::open(&file) {
                Ok(source) => {
                    let words = file
                        .file_stem()
                        .unwrap_or_default()
                        .to_string_lossy()
                        .replace('_', " ");
                    subjects.push(Subject {
                        caption: format!("a photo of a {words}"),
                        picture: source.picture,
                    });
                }
                Err(error) => eprintln!("{}: left out: {error}", file.display()),
            }
        }
        if subjects.is_empty() {
            bail!("{}: no PNG, JPEG or WebP pictures there", folder.display());
        }
        return Ok(subjects);
    }
    // What the bundle brings along, and drawings of the objects that are never trained on.
    let artwork = match bundle.path(&Location("artwork".into())) {
        Ok(folder) if folder.is_dir() => cut_outs(&folder)?,
        _ => Vec::new(),
    };
    let colors = [Color::Red, Color::Blue, Color::Green, Color::Yellow];
    let drawn = (0..PICTURES).map(|i| {
        let object = Object::HELD_OUT[i % Object::HELD_OUT.len()];
        let color = colors[i / Object::HELD_OUT.len() % colors.len()];
        Scene::plain(object, color, seed + i as u64)
    });
    let known = artwork.into_iter().enumerate();
    let scenes: Vec<Scene> = known
        .map(|(i, art)| Scene::plain(art, None, seed + i as u64))
        .take(PICTURES - Object::HELD_OUT.len())
        .chain(drawn)
        .take(PICTURES)
        .collect();
    Ok(scenes
        .into_iter()
        .map(|scene| Subject {
            caption: scene.caption(),
            picture: Picture::from_rgb(128, 128, scene.render(128)),
        })
        .collect())
}

/// The request that the demo makes: the bundle's own way to edit.
fn request(user: &str, subject: &Subject, seed: u64) -> EditRequest {
    EditRequest {
        user: user.into(),
        source: Some(Source::of(subject.picture.clone())),
        caption: Some(subject.caption.clone()),
        settings: EditSettings {
            seed,
            count: 1,
            ..EditSettings::default()
        },
        ..EditRequest::default()
    }
}

fn edit_everything(
    engine: &Engine,
    store: &Store,
    users: &[String],
    subjects: &[Subject],
    common: &Common,
    output: &Output,
    page: &mut Page,
) -> Result<()> {
    let snapshot = store.snapshot();
    let bar = output.bar((users.len() * subjects.len()) as u64, "edits");
    let started = Instant::now();
    let mut spent = 0.0;
    for (at, subject) in subjects.iter().enumerate() {
        if cancelled() {
            bail!("interrupted");
        }
        let requests: Vec<EditRequest> = users
            .iter()
            .map(|user| request(user, subject, common.seed + at as u64))
            .collect();
        let mut hooks = Hooks {
            cancel: Some(&CANCELLED),
            ..Hooks::default()
        };
        let edits = engine.edit_batch(&snapshot, &requests, &mut hooks)?;
        spent += edits.first().map_or(0.0, |e| e.seconds.sample);
        let cells = edits.iter().map(cell).collect::<Result<_>>()?;
        page.grids.push(Grid {
            caption: subject.caption.clone(),
            before: subject.picture.to_png(&[])?,
            edges: canny(&subject.picture, 100, 200).to_picture().to_png(&[])?,
            cells,
        });
        bar.inc(users.len() as u64);
    }
    bar.finish_and_clear();
    let seconds = started.elapsed().as_secs_f64();
    let count = users.len() * subjects.len();
    page.timings.push((
        format!("{count} personal edits"),
        seconds,
        format!(
            "{:.2} s each, of which {:.2} s in the picture model",
            seconds / count as f64,
            spent / count as f64
        ),
    ));
    Ok(())
}

fn cell(edit: &Edit) -> Result<Cell> {
    let picture = edit.images.first().context("an edit without a picture")?;
    let why = &edit.instruction.why;
    let neighbors: Vec<String> = why
        .neighbors
        .iter()
        .take(3)
        .map(|n| format!("{} ({:.2})", n.user, n.weight))
        .collect();
    Ok(Cell {
        instruction: edit.instruction.instruction.clone(),
        why: format!(
            "own likes: {}; from neighbours: {}; neighbours: {}",
            why.likes.join(", "),
            why.from_neighbors.join(", "),
            neighbors.join(", ")
        ),
        generic: edit.instruction.fallback.is_some(),
        after: picture.to_png(&[])?,
    })
}

/// The first two newcomers accept their edit, the others reject it; everyone is asked again.
fn answer_and_edit_again(
    engine: &Engine,
    store: &Store,
    users: &[String],
    subject: &Subject,
    common: &Common,
    page: &mut Page,
) -> Result<()> {
    for (at, user) in users.iter().enumerate() {
        let mut hooks = Hooks {
            cancel: Some(&CANCELLED),
            ..Hooks::default()
        };
        let request = request(user, subject, common.seed);
        let first = engine.edit(&store.snapshot(), &request, &mut hooks)?;
        let now = i64::try_from(
            std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)?
                .as_millis(),
        )?;
        let record = record_of(&first, &request, &store.snapshot(), now);
        store.put_edit(&record)?;
        let (verdict, word) = if at < 2 {
            (Answer::Accept, "accept")
        } else {
            (Answer::Reject, "reject")
        };
        let learned = feedback(&store.snapshot(), &record.id, verdict, None, now)?;
        commit(store, &learned)?;
        let second = engine.edit(&store.snapshot(), &request, &mut hooks)?;
        let events: Vec<String> = learned
            .events
            .iter()
            .map(|e| format!("{} {}", e.polarity.as_str(), e.attribute))
            .collect();
        page.rounds.push(Round {
            user: user.clone(),
            verdict: word.into(),
            learned: if events.is_empty() {
                "nothing to learn from".into()
            } else {
                events.join(", ")
            },
            first: cell(&first)?,
            second: cell(&second)?,
        });
    }
    Ok(())
}
