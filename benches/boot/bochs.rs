//! Bochs. It boots as a PC does, so the kernel goes on a CD with ISOLINUX before it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

use crate::inputs::{AT_THE_SHELL, Inputs};
use crate::leg::{Details, Kind, Leg, Work};
use crate::options::Options;
use crate::process::{Console, Finished, Job};
use crate::qemu::find_in_path;

/// Where Debian's packages put what Bochs needs: its firmware, a display for terminals, and a boot loader.
const BIOS: &str = "/usr/share/bochs/BIOS-bochs-latest";
const VGA_BIOS: &str = "/usr/share/bochs/VGABIOS-lgpl-latest";
const DISPLAY: &str = "/usr/lib/x86_64-linux-gnu/bochs/plugins/libbx_term_gui.so";
const ISOLINUX: &str = "/usr/lib/ISOLINUX/isolinux.bin";
const LDLINUX: &str = "/usr/lib/syslinux/modules/bios/ldlinux.c32";
const PACKAGES: &str = "bochs bochs-term isolinux syslinux-common xorriso";

/// What ISOLINUX says on the serial port when it goes over to the kernel.
const LOADED: &str = "Loading /initrd...ok";
/// Instructions that Bochs takes for a second of its guest's time; about what it executes on a host of today.
const GUEST_SECOND: u64 = 120_000_000;

/// Where Bochs and what it needs are.
pub struct Installation {
    bochs: PathBuf,
    xorriso: PathBuf,
}

/// Finds Bochs, its firmware and a boot loader.
///
/// # Errors
/// A line for the user that says what is missing.
pub fn find() -> Result<Installation, String> {
    let mut missing: Vec<&str> = [BIOS, VGA_BIOS, DISPLAY, ISOLINUX, LDLINUX]
        .into_iter()
        .filter(|file| !Path::new(file).exists())
        .collect();
    let (bochs, xorriso) = (find_in_path("bochs"), find_in_path("xorriso"));
    missing.extend(bochs.is_none().then_some("bochs"));
    missing.extend(xorriso.is_none().then_some("xorriso"));
    match (bochs, xorriso) {
        (Some(bochs), Some(xorriso)) if missing.is_empty() => Ok(Installation { bochs, xorriso }),
        _ => Err(format!(
            "Bochs is left out: there is no {} (Debian: apt-get install --no-install-recommends {PACKAGES})",
            missing.join(", ")
        )),
    }
}

/// Bochs with the packed kernel.
///
/// # Errors
/// Where the CD cannot be made.
pub fn leg(installation: &Installation, inputs: &Inputs, options: &Options) -> anyhow::Result<Leg> {
    let folder = inputs.folder().to_owned();
    let disc = make_disc(installation, inputs)?;
    let (settings, script, console) = (folder.join("bochsrc"), folder.join("debugger"), folder.join("com1"));
    fs::write(&settings, bochsrc(&folder, &disc, &console, options))?;
    fs::write(&script, "continue\n")?;
    let help = help(&installation.bochs);
    let has_debugger = help.contains("-rc ");
    let bochs = installation.bochs.clone();
    let log = folder.join("bochs.log");
    let read_log = log.clone();
    Ok(Leg {
        name: format!("bochs {}", version(&help)),
        kind: Kind::Peer,
        runs: options.bochs_runs,
        work: Work::CountedWithIdle,
        job: Box::new(move || {
            let mut command = Command::new(&bochs);
            command.arg("-q").arg("-f").arg(&settings).arg("-log").arg(&log);
            // A Bochs with a debugger, as Debian's, waits for this word; one without does not know the option.
            if has_debugger {
                command.arg("-rc").arg(&script);
            }
            Job {
                command,
                console: Console::File(console.clone()),
                marks: vec![LOADED, AT_THE_SHELL],
                stop_at_last_mark: false,
            }
        }),
        details: Box::new(move |finished| details(finished, &read_log)),
    })
}

/// A CD that boots the kernel.
fn make_disc(installation: &Installation, inputs: &Inputs) -> anyhow::Result<PathBuf> {
    let (root, disc) = (inputs.folder().join("cd"), inputs.folder().join("cd.iso"));
    fs::create_dir_all(root.join("isolinux"))?;
    let copy = |from: &Path, to: &str| {
        fs::copy(from, root.join(to)).map(drop).with_context(|| format!("cannot copy {}", from.display()))
    };
    copy(Path::new(ISOLINUX), "isolinux/isolinux.bin")?;
    copy(Path::new(LDLINUX), "isolinux/ldlinux.c32")?;
    copy(&inputs.bzimage, "vmlinuz")?;
    copy(&inputs.initrd, "initrd")?;
    let menu = format!(
        "SERIAL 0 115200\nDEFAULT linux\nLABEL linux\nKERNEL /vmlinuz\nINITRD /initrd\nAPPEND {}\n",
        inputs.cmdline
    );
    fs::write(root.join("isolinux/isolinux.cfg"), menu)?;
    let output = Command::new(&installation.xorriso)
        .args(["-as", "mkisofs", "-quiet", "-b", "isolinux/isolinux.bin", "-c", "isolinux/boot.cat"])
        .args(["-no-emul-boot", "-boot-load-size", "4", "-boot-info-table", "-o"])
        .args([&disc, &root])
        .output()
        .context("cannot start xorriso")?;
    if !output.status.success() {
        bail!("xorriso made no CD: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(disc)
}

/// The settings: no devices but what the boot needs, as fast as it goes.
fn bochsrc(folder: &Path, disc: &Path, console: &Path, options: &Options) -> String {
    let (folder, disc, console) = (folder.display(), disc.display(), console.display());
    format!(
        "display_library: term\n\
         romimage: file={BIOS}\n\
         vgaromimage: file={VGA_BIOS}\n\
         megs: {}\n\
         cpu: model=corei7_haswell_4770, count=1, ips={GUEST_SECOND}, reset_on_triple_fault=0, ignore_bad_msrs=1\n\
         clock: sync=none\n\
         ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14\n\
         ata0-master: type=cdrom, path={disc}, status=inserted\n\
         boot: cdrom\n\
         log: {folder}/bochs.log\n\
         panic: action=fatal\nerror: action=report\ninfo: action=report\ndebug: action=ignore\n\
         com1: enabled=1, mode=file, dev={console}\n\
         com2: enabled=1, mode=null\n",
        options.memory
    )
}

/// What it prints with `--help`.
fn help(bochs: &Path) -> String {
    let output = Command::new(bochs).arg("--help").output();
    let bytes = output.map(|output| [output.stdout, output.stderr].concat()).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// `Bochs x86 Emulator 2.7` in that.
fn version(help: &str) -> &str {
    let words = help.split_once("Emulator").map(|(_, rest)| rest).unwrap_or_default();
    words.split_whitespace().next().unwrap_or("?")
}

/// When the boot loader was done, and the tick that begins each line of the log: one an instruction.
fn details(finished: &Finished, log: &Path) -> Details {
    let log = fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let ticks = |line: &str| line.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok();
    Details {
        before_kernel: finished.marks.first().copied().flatten(),
        instructions: log.lines().rev().find_map(ticks),
        ..Details::default()
    }
}
