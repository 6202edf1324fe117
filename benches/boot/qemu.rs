//! QEMU with its translator, TCG.

use std::path::{Path, PathBuf};
use std::process::Command;

use engine::{HostTime, TimeSource};

use crate::inputs::{AT_THE_SHELL, Inputs};
use crate::leg::{Details, Kind, Leg, Work};
use crate::options::Options;
use crate::process::{Console, Finished, Job};

const PROGRAM: &str = "qemu-system-x86_64";
/// The kernel's first words, where it says everything and has an early console. In this order: the console shows at once
/// what was said before it was there.
const FIRST_WORDS: &str = "Linux version";
const EARLY_CONSOLE: &str = " ignore_loglevel earlyprintk=ttyS0,115200";

const MICROVM: &[&str] = &["-M", "microvm"];

/// Finds QEMU.
///
/// # Errors
/// A line for the user, where it is not installed.
pub fn find() -> Result<PathBuf, String> {
    find_in_path(PROGRAM).ok_or_else(|| {
        format!("QEMU is left out: there is no {PROGRAM} (Debian: apt-get install --no-install-recommends qemu-system-x86)")
    })
}

/// A program in PATH.
pub fn find_in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file())
}

/// What QEMU calls itself: `QEMU emulator version 7.2.22 (…)`.
fn version(program: &Path) -> String {
    let output = Command::new(program).arg("--version").output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.split_whitespace().nth(3).unwrap_or("?").to_owned()
}

/// Its default machine and its quickest, microvm, with the packed and the unpacked kernel, how soon the kernel speaks on
/// the default machine in both, and the machine q35 with `--extra`.
pub fn legs(program: &Path, inputs: &Inputs, options: &Options) -> Vec<Leg> {
    let name = format!("qemu {} tcg", version(program));
    let base = |kind, name: String, kernel: &Path, more: &[&str]| {
        leg(program, inputs, options, kind, name, &[&["-kernel", &kernel.to_string_lossy()], more].concat())
    };
    let packed = |name: String, more: &[&str]| base(Kind::Peer, name, &inputs.bzimage, more);
    let mut legs = vec![packed(format!("{name}, pc"), &[])];
    legs.push(base(Kind::FirstWords, format!("{name}, pc"), &inputs.bzimage, &[]));
    legs.push(packed(format!("{name}, microvm"), MICROVM));
    if let Some(kernel) = &inputs.vmlinux {
        let unpacked = |machine: &str, more: &[&str]| Leg {
            work: Work::LikeUnpacked,
            ..base(Kind::Peer, format!("{name}, {machine}, vmlinux"), kernel, more)
        };
        legs.push(unpacked("pc", &[]));
        legs.push(base(Kind::FirstWords, format!("{name}, pc, vmlinux"), kernel, &[]));
        legs.push(unpacked("microvm", MICROVM));
    }
    if options.extra {
        legs.push(packed(format!("{name}, q35"), &["-M", "q35"]));
    }
    legs
}

fn leg(program: &Path, inputs: &Inputs, options: &Options, kind: Kind, name: String, more: &[&str]) -> Leg {
    let first_words = kind == Kind::FirstWords;
    let mut arguments: Vec<String> = ["-accel", "tcg", "-cpu", "max", "-nodefaults", "-no-user-config"]
        .into_iter()
        .chain(["-display", "none", "-no-reboot", "-serial", "stdio", "-serial", "null"])
        .chain(more.iter().copied())
        .map(str::to_owned)
        .collect();
    arguments.extend(["-m".into(), format!("{}M", options.memory)]);
    let mut cmdline = inputs.cmdline.clone();
    if first_words {
        cmdline.push_str(EARLY_CONSOLE);
    }
    if more.ends_with(MICROVM) {
        // It has no timer that its kernel could calibrate the clock with: without this it often hangs. The clock is the
        // host's.
        let frequency = HostTime::start().tsc_frequency() / 1000;
        cmdline.push_str(&format!(" tsc_early_khz={frequency}"));
    }
    arguments.extend(["-append".into(), cmdline, "-initrd".into()]);
    let (program, initrd) = (program.to_owned(), inputs.initrd.clone());
    Leg {
        name,
        kind,
        runs: options.runs,
        work: Work::LikePacked,
        job: Box::new(move || {
            let mut command = Command::new(&program);
            command.args(&arguments).arg(&initrd);
            let mark = if first_words { FIRST_WORDS } else { AT_THE_SHELL };
            Job { command, console: Console::Stdout, marks: vec![mark], stop_at_last_mark: first_words }
        }),
        details: if first_words { Box::new(time_to_first_words) } else { Box::new(|_| Details::default()) },
    }
}

fn time_to_first_words(finished: &Finished) -> Details {
    Details { before_kernel: finished.marks.first().copied().flatten(), ..Details::default() }
}
