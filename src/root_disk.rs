//! A disk of `ringside guest build` among those of a run: what the guest's init is told of it.

use std::io::{self, IsTerminal, Write};
use std::path::Path;

use anyhow::bail;
use ringside::guest::root_disk;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::cli::RunArgs;

/// The first disk, where it has a system that is to be booted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RootDisk {
    read_only: bool,
    /// Whether a terminal gives the input.
    interactive: bool,
}

/// Looks whether the default guest is to go on from a disk.
///
/// # Errors
/// Where packages for the initramfs were asked for as well: the system would not see them.
pub fn find(args: &RunArgs) -> anyhow::Result<Option<RootDisk>> {
    let Some(image) = args.disk.first().map(|disk| &disk.image) else { return Ok(None) };
    if args.kernel.is_some()
        || args.firmware.is_some()
        || args.initrd.is_some()
        || args.root.is_some()
        || args.rescue
    {
        return Ok(None);
    }
    // A disk that cannot be read is an error of the machine's, which knows more of it.
    let reading = disk::Options { read_only: true, snapshot: false, ..image.clone() };
    if !disk::open(&reading).is_ok_and(|disk| root_disk::is_root(&*disk)) {
        return Ok(None);
    }
    if !args.packages.is_empty() {
        bail!(
            "{} has a system of its own, which would not see --package: name packages when it is built, or use \
             --rescue for the default guest",
            image.path.display()
        );
    }
    Ok(Some(RootDisk {
        read_only: image.read_only && !image.snapshot,
        interactive: io::stdin().is_terminal(),
    }))
}

/// Whether what is booted is a system that asks who logs in: one on a disk, or with systemd in a folder.
///
/// # Errors
/// As [`find`].
pub fn asks_for_login(args: &RunArgs) -> anyhow::Result<bool> {
    Ok(find(args)?.is_some() || has_systemd(args))
}

fn has_systemd(args: &RunArgs) -> bool {
    let places = ["usr/lib/systemd/systemd", "lib/systemd/systemd"];
    args.root.as_ref().is_some_and(|root| has_one_of(&root.path, &places) == Some(true))
}

/// Refuses a root folder in which there is nothing to run.
///
/// # Errors
/// For a folder without `/bin/sh` where a command is to be run, or without that and any init.
pub fn check_folder(args: &RunArgs) -> anyhow::Result<()> {
    let Some(root) = &args.root else { return Ok(()) };
    let (programs, what): (&[&str], _) = match args.exec {
        Some(_) => (&["bin/sh"], "/bin/sh to run the command"),
        None => (&["sbin/init", "etc/init", "bin/init", "bin/sh"], "/sbin/init and no /bin/sh"),
    };
    if has_one_of(&root.path, programs) == Some(false) {
        bail!("{} is no root file system: it has no {what}", root.path.display());
    }
    Ok(())
}

/// Whether a folder has one of these, with links as they are where the folder is the root; `None` where that cannot be
/// found out: whoever opens the folder knows why.
fn has_one_of(folder: &Path, names: &[&str]) -> Option<bool> {
    let (flags, mode) = (OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    let root = rustix::fs::open(folder, flags | OFlags::DIRECTORY, mode).ok()?;
    for name in names {
        // A link that leads nowhere yet is the guest's to follow.
        match rustix::fs::openat2(&root, *name, flags | OFlags::NOFOLLOW, mode, ResolveFlags::IN_ROOT) {
            Ok(_) => return Some(true),
            Err(Errno::NOENT | Errno::NOTDIR) => {}
            Err(_) => return None,
        }
    }
    Some(false)
}

/// What the kernel's command line says of the system that is booted.
///
/// # Errors
/// As [`find`].
pub fn arguments(args: &RunArgs) -> anyhow::Result<Option<String>> {
    let on_disk = find(args)?.map(RootDisk::arguments);
    Ok(on_disk
        .or_else(|| (has_systemd(args) && !io::stdin().is_terminal()).then(|| INPUT_IS_PIPE.to_owned())))
}

/// Tells the system that nobody types.
const INPUT_IS_PIPE: &str = "RINGSIDE_INPUT=pipe";

impl RootDisk {
    /// What the kernel's command line says of it: words that the kernel does not know become init's environment.
    fn arguments(self) -> String {
        let mode = if self.read_only { " RINGSIDE_ROOT_MODE=ro,noload" } else { "" };
        let (space, input) = if self.interactive { ("", "") } else { (" ", INPUT_IS_PIPE) };
        format!("RINGSIDE_ROOT=/dev/vda{mode}{space}{input}")
    }
}

/// Input that is held back: a login throws away what was typed before it.
pub struct HeldInput(Box<dyn FnOnce() -> io::Result<()> + Send>);

impl HeldInput {
    /// Input that begins to come with `begin`.
    pub fn new(begin: impl FnOnce() -> io::Result<()> + Send + 'static) -> Self {
        Self(Box::new(begin))
    }

    /// Begins once the console has shown a login prompt on its way to `output`.
    pub fn until_login<W: Write>(self, output: W) -> impl Write + use<W> {
        LoginWatch { output, input: Some(self), matched: 0 }
    }
}

/// What a login prompt ends with, and an automatic login's line has in it.
const PROMPT: &[u8] = b" login: ";

struct LoginWatch<W> {
    output: W,
    input: Option<HeldInput>,
    /// Bytes of the prompt that were seen last.
    matched: usize,
}

impl<W> LoginWatch<W> {
    fn begin(&mut self) {
        self.matched = 0;
        if let Some(HeldInput(begin)) = self.input.take()
            && let Err(error) = begin()
        {
            log::error!("cannot read standard input: {error}");
        }
    }
}

impl<W: Write> Write for LoginWatch<W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let taken = self.output.write(data)?;
        for &byte in &data[..taken] {
            if self.input.is_none() {
                break;
            }
            let next = if byte == PROMPT[self.matched] { self.matched + 1 } else { 0 };
            self.matched = if next == 0 { usize::from(byte == PROMPT[0]) } else { next };
            if self.matched == PROMPT.len() {
                self.begin();
            }
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn input_begins_once_with_the_login_prompt_however_it_is_cut() {
        for cut in 1..12 {
            let begun = Arc::new(AtomicU32::new(0));
            let count = begun.clone();
            let held = HeldInput::new(move || {
                count.fetch_add(1, Ordering::SeqCst);
                Ok(())
            });
            let mut shown = Vec::new();
            let mut watch = held.until_login(&mut shown);
            let (before, prompt) =
                (b"Starting login;  login; log\nbox  login".as_slice(), b": root, login: ");
            before.chunks(cut).for_each(|part| watch.write_all(part).unwrap());
            assert_eq!(begun.load(Ordering::SeqCst), 0);
            prompt.chunks(cut).for_each(|part| watch.write_all(part).unwrap());
            assert_eq!(begun.load(Ordering::SeqCst), 1);
            drop(watch);
            assert_eq!(shown, [before, prompt].concat());
        }
    }

    #[test]
    fn a_root_folder_is_looked_into_as_the_guest_will() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        assert_eq!(has_one_of(path, &["bin/sh"]), Some(false));
        std::fs::create_dir_all(path.join("usr/bin")).unwrap();
        // The host's own `/usr/bin` has a shell, too; it is not what the link means.
        std::os::unix::fs::symlink("/usr/bin", path.join("bin")).unwrap();
        assert_eq!(has_one_of(path, &["bin/sh"]), Some(false));
        std::os::unix::fs::symlink("busybox", path.join("usr/bin/sh")).unwrap();
        assert_eq!(has_one_of(path, &["sbin/init", "bin/sh"]), Some(true));
        assert_eq!(has_one_of(&path.join("missing"), &["bin/sh"]), None);
    }

    #[test]
    fn init_is_told_of_the_disk_by_the_command_line() {
        let disk = |read_only, interactive| RootDisk { read_only, interactive }.arguments();
        assert_eq!(disk(false, true), "RINGSIDE_ROOT=/dev/vda");
        assert_eq!(
            disk(true, false),
            "RINGSIDE_ROOT=/dev/vda RINGSIDE_ROOT_MODE=ro,noload RINGSIDE_INPUT=pipe"
        );
    }
}
