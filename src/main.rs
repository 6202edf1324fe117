//! The `ringside` command: read the command line, build a machine, run it, tell how it ended.

mod cli;
mod console;
mod exit_status;
mod guest_command;
mod keys;
mod logger;
mod run;
mod size;
mod stats;
mod terminal;

use std::process::ExitCode;
use std::time::Instant;

use cli::{Cli, Command};

fn main() -> ExitCode {
    let started = Instant::now();
    let cli = Cli::read(std::env::args_os()).unwrap_or_else(|error| error.exit());
    logger::start(cli.verbose);
    terminal::restore_on_panic();
    let done = match &cli.command {
        None => run::run(&cli.run, started),
        Some(Command::Run(args)) => run::run(args, started),
        Some(Command::Guest(command)) => guest_command::run(command),
    };
    terminal::restore();
    match done {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            terminal::say(&format!("ringside: {error:#}\n"));
            ExitCode::from(exit_status::HOST_ERROR)
        }
    }
}
