//! `ringside guest build`: disks that are made inside a guest.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use anyhow::{Context, bail};
use disk::Format;
use ringside::guest::GuestError;
use ringside::guest::root_disk::{self, Cancelled, Login, Observer, RootDisk};
use vmm::StopReason;

use crate::cli::{self, BuildArgs, Switch};
use crate::console::{self, Present};
use crate::{exit_status, size};

/// Makes a disk with Debian; gives the exit status.
///
/// # Errors
/// What keeps it from being made; nothing is left behind then.
pub fn debian(args: &BuildArgs) -> anyhow::Result<u8> {
    let output = &args.output;
    if output.is_dir() {
        bail!("{} is a folder: write the name of a file", output.display());
    }
    if !args.force && output.symlink_metadata().is_ok() {
        bail!("{} exists already: remove it, or give --force", output.display());
    }
    let password = match &args.password_file {
        Some(file) => Some(read_password(file)?),
        None => args.password.clone(),
    };
    let automatic = args.autologin.map_or(password.is_none(), |switch| switch == Switch::On);
    if !automatic && password.is_none() {
        bail!("nobody could log in: give --password or --password-file, or leave --autologin on");
    }
    let disk = RootDisk {
        packages: args.packages.clone(),
        size: args.size,
        hostname: args.hostname.clone(),
        login: Login { user: args.user.clone(), password, automatic },
    };
    let present = Present::default();
    console::follow_signals(&present).context("cannot handle signals")?;
    let cancelled = || present.stopped().is_some();
    let mut observer = Observer {
        progress: &mut *ringside::guest::to_stderr(),
        cancelled: Cancelled(&cancelled),
        fetched: &|| present.begin(),
        started: &|controls| present.set(controls),
    };
    let is_qcow2 = output.extension().is_some_and(|ending| ending == "qcow2");
    let format = args.format.unwrap_or(if is_qcow2 { Format::Qcow2 } else { Format::Raw });
    match (root_disk::build(&disk, output, format, &mut observer), present.stopped()) {
        // Whatever a signal made fail: apt gets it too, at a terminal.
        (Err(error), Some(StopReason::Signal(number))) => {
            log::info!("{error}");
            crate::terminal::say(&format!("ringside: {}\n", GuestError::Cancelled));
            Ok(exit_status::SIGNAL.saturating_add(u8::try_from(number).unwrap_or(0)))
        }
        (result, _) => {
            result?;
            eprintln!(
                "{} is ready, a disk of {}. Boot it with: ringside run --disk {}",
                output.display(),
                size::display(args.size),
                output.display()
            );
            Ok(0)
        }
    }
}

fn read_password(file: &Path) -> anyhow::Result<String> {
    let reader: Box<dyn Read> = match file.to_str() {
        Some("-") => Box::new(io::stdin()),
        _ => Box::new(
            File::open(file).with_context(|| format!("cannot read the password from {}", file.display()))?,
        ),
    };
    let mut line = String::new();
    BufReader::new(reader.take(1000))
        .read_line(&mut line)
        .with_context(|| format!("cannot read the password from {}", file.display()))?;
    cli::password(line.trim_end_matches(['\n', '\r'])).map_err(anyhow::Error::msg)
}
