//! The `ringside` command: read the command line, build a machine, run it, tell how it ended.

mod allocator;
mod balloon_command;
mod build_command;
mod cli;
mod console;
mod device_options;
mod disk_command;
mod disk_options;
mod exit_status;
mod guest_command;
mod keys;
mod logger;
mod root_disk;
mod run;
mod share_options;
mod size;
mod stats;
mod terminal;

use std::process::ExitCode;
use std::time::Instant;

use cli::{Cli, Command};

fn main() -> ExitCode {
    let started = Instant::now();
    allocator::give_back_large_blocks();
    let cli = Cli::read(std::env::args_os()).unwrap_or_else(|error| error.exit());
    logger::start(cli.verbose);
    terminal::restore_on_panic();
    outlive_file_limits();
    let done = match &cli.command {
        None => run::run(&cli.run, started),
        Some(Command::Run(args)) => run::run(args, started),
        Some(Command::Guest(command)) => guest_command::run(command),
        Some(Command::Balloon { socket, size }) => balloon_command::run(socket, *size),
        Some(Command::Disk(command)) => disk_command::run(command),
    };
    terminal::restore();
    match done {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            terminal::say(&format!("ringside: {}\n", with_causes(&error)));
            ExitCode::from(exit_status::HOST_ERROR)
        }
    }
}

/// A write beyond the limit on files' sizes is an error like others, not the end of the process: a disk waits for space.
fn outlive_file_limits() {
    let seen = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    // Where it cannot be had, the signal does what it did.
    let _ = signal_hook::flag::register(libc::SIGXFSZ, seen);
}

/// An error and its causes, but for those that it has told already.
fn with_causes(error: &anyhow::Error) -> String {
    error.chain().skip(1).fold(error.to_string(), |text, cause| {
        let cause = cause.to_string();
        if text.contains(&cause) { text } else { format!("{text}: {cause}") }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_told_once() {
        let missing = || std::io::Error::other("no such disk");
        let told = anyhow::Error::new(missing()).context("cannot write: no such disk");
        assert_eq!(with_causes(&told), "cannot write: no such disk");
        let untold = anyhow::Error::new(missing()).context("cannot write");
        assert_eq!(with_causes(&untold), "cannot write: no such disk");
    }
}
