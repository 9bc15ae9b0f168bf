//! The program `simpatico`: the door to the three libraries.
//!
//! Each command is a thin function: it parses its flags, calls a library, prints what came
//! back. Absent on purpose: anything another program could want to call.

mod demo;
mod edit_commands;
mod eval_commands;
mod forget;
mod learn_commands;
mod model_commands;
mod output;
mod store_commands;
mod train_commands;

use clap::parser::ValueSource;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use output::Output;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

/// Learns people's taste from likes and dislikes, and edits pictures to it.
#[derive(Parser)]
#[command(name = "simpatico", version, about, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

/// Flags every command takes.
#[derive(clap::Args, Clone)]
struct Common {
    /// The folder with the store
    #[arg(
        long,
        global = true,
        env = "SIMPATICO_STORE",
        default_value = "./simpatico.store",
        value_name = "DIR"
    )]
    store: PathBuf,
    /// Whether the command line itself names the store
    #[arg(skip)]
    store_given: bool,
    /// The bundle of models: a name or a folder
    #[arg(
        long,
        global = true,
        env = "SIMPATICO_BUNDLE",
        default_value = "default",
        value_name = "NAME|DIR"
    )]
    bundle: String,
    /// Print one JSON object a line on stdout, and nothing else there
    #[arg(long, global = true)]
    json: bool,
    /// Where to compute: cpu, cuda, cuda:N or metal; the best present if not given
    #[arg(long, global = true, value_name = "DEVICE")]
    device: Option<String>,
    /// The seed of everything random
    #[arg(long, global = true, default_value_t = 0, value_name = "N")]
    seed: u64,
    /// No progress and no notes on stderr
    #[arg(long, global = true)]
    quiet: bool,
}

#[derive(Subcommand)]
enum Command {
    #[command(flatten)]
    Store(store_commands::StoreCommand),
    /// Data sets: make one, or read one into the store
    #[command(subcommand)]
    Dataset(learn_commands::DatasetCommand),
    /// Give each attribute its text vector
    Featurize,
    /// Train the graph encoder, the policy or the picture model
    #[command(subcommand)]
    Train(train_commands::TrainCommand),
    /// Measure: links, neighbours, prompts, pictures
    #[command(subcommand)]
    Eval(eval_commands::EvalCommand),
    /// Models: what there is, fetch them, check them
    #[command(subcommand)]
    Models(model_commands::ModelsCommand),
    #[command(flatten)]
    Edit(edit_commands::EditCommand),
    /// The whole job on the spot; ends with one page to look at
    Demo(demo::DemoArgs),
}

/// What a command came to, when it did not fail.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// All done.
    Done,
    /// Done, but some input was rejected.
    SomeRejected,
}

static CANCELLED: AtomicBool = AtomicBool::new(false);

/// Whether Ctrl-C was pressed. Long work asks between steps and stops whole.
fn cancelled() -> bool {
    CANCELLED.load(Ordering::Relaxed)
}

fn main() -> ExitCode {
    // SAFETY: nothing has started a thread yet.
    #[allow(unsafe_code)]
    unsafe {
        simpatico_engine::use_own_cores()
    };
    let matches = Cli::command().get_matches();
    let mut cli = Cli::from_arg_matches(&matches).unwrap_or_else(|e| e.exit());
    cli.common.store_given = matches.value_source("store") == Some(ValueSource::CommandLine);
    // A second Ctrl-C ends the program at once; the log makes even that safe.
    let _ = ctrlc::set_handler(|| {
        if CANCELLED.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
    });
    let output = Output::new(cli.common.json, cli.common.quiet);
    let result = match cli.command {
        Command::Store(command) => store_commands::run(command, &cli.common, &output),
        Command::Dataset(command) => learn_commands::dataset(command, &cli.common, &output),
        Command::Featurize => learn_commands::featurize(&cli.common, &output),
        Command::Train(command) => train_commands::run(command, &cli.common, &output),
        Command::Eval(command) => eval_commands::run(command, &cli.common, &output),
        Command::Edit(command) => edit_commands::run(command, &cli.common, &output),
        Command::Demo(args) => demo::run(&args, &cli.common, &output),
        Command::Models(command) => model_commands::run(command, &cli.common, &output),
    };
    match result {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::SomeRejected) => ExitCode::from(3),
        Err(error) if output::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", output::in_words(&error));
            ExitCode::from(if error.is::<output::Usage>() { 2 } else { 1 })
        }
    }
}
