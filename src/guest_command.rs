//! `ringside guest`: the guests that can be had by name.

use std::fmt::Write as _;
use std::io::Write as _;

use anyhow::bail;
use ringside::guest;

use crate::cli::GuestCommand;
use crate::size;

/// Does what the command says; gives the exit status.
///
/// # Errors
/// What keeps it from being done.
pub fn run(command: &GuestCommand) -> anyhow::Result<u8> {
    match command {
        GuestCommand::Fetch { name } => {
            let files = guest::fetch(name, &mut *guest::to_stderr())?;
            eprintln!("{name} {} is in {}", files.version, folder(&files));
        }
        GuestCommand::List => print(&table(&guest::list()?))?,
        GuestCommand::Remove { name } => {
            if !guest::remove(name)? {
                bail!("the guest {name} is not here");
            }
            eprintln!("{name} is removed");
        }
    }
    Ok(0)
}

fn folder(files: &guest::GuestFiles) -> String {
    files.kernel.parent().map(|folder| folder.display().to_string()).unwrap_or_default()
}

fn table(guests: &[guest::Listed]) -> String {
    let mut text = String::new();
    for listed in guests {
        let here = match &listed.files {
            Some(files) => format!("{}, {}", files.version, size::display(listed.bytes)),
            None => "not fetched".into(),
        };
        let _ = writeln!(text, "{:<14} {here:<28} {}", listed.guest.name, listed.guest.description);
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
