//! `ringside guest`: the guests that can be had by name.

use std::fmt::Write as _;
use std::io::Write as _;

use anyhow::{Context, bail};
use ringside::guest::{self, software};

use crate::cli::{BuildCommand, GuestCommand};
use crate::console::{self, Present};
use crate::{build_command, size};

/// Does what the command says; gives the exit status.
///
/// # Errors
/// What keeps it from being done.
pub fn run(command: &GuestCommand) -> anyhow::Result<u8> {
    match command {
        GuestCommand::Fetch { name, packages } => {
            // No machine: a signal ends the process, and what it has started.
            console::follow_signals(&Present::default()).context("cannot handle signals")?;
            let progress = &mut *guest::to_stderr();
            let files = guest::fetch(name, progress)?;
            eprintln!("{name} {} is in {}", files.version, folder(&files));
            if !packages.is_empty() {
                let software = software::with_packages(name, &files, packages, progress)?;
                let (count, bytes) = (software.packages.len(), size::display(software.bytes));
                eprintln!("{count} packages, {bytes}: {}", software.packages.join(", "));
            }
        }
        GuestCommand::Build(BuildCommand::Debian(args)) => return build_command::debian(args),
        GuestCommand::List => print(&table(&guest::list()?, software::bytes()))?,
        GuestCommand::Remove { name, packages } => {
            if *packages {
                eprintln!("{} of packages are removed", size::display(software::remove_all()?));
            }
            if let Some(name) = name {
                if !guest::remove(name)? {
                    bail!("the guest {name} is not here");
                }
                eprintln!("{name} is removed");
            }
        }
    }
    Ok(0)
}

fn folder(files: &guest::GuestFiles) -> String {
    files.kernel.parent().map(|folder| folder.display().to_string()).unwrap_or_default()
}

fn table(guests: &[guest::Listed], packages: u64) -> String {
    let mut text = String::new();
    for listed in guests {
        let here = match &listed.files {
            Some(files) => format!("{}, {}", files.version, size::display(listed.bytes)),
            None => "not fetched".into(),
        };
        let _ = writeln!(text, "{:<14} {here:<28} {}", listed.guest.name, listed.guest.description);
    }
    if packages > 0 {
        let _ = writeln!(text, "{:<14} {:<28} for --package", "packages", size::display(packages));
    }
    text
}

/// To stdout; a reader that has seen enough is no error.
fn print(text: &str) -> anyhow::Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        done => Ok(done?),
    }
}
