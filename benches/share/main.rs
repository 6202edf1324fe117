//! A tree of 10,000 files over a shared folder, copied in both directions, listed and removed, and unpacked on ext4 on a
//! disk: by Debian in Ringside and in QEMU's TCG, with the same kernel and initramfs.
//!
//! The guest's script prints a word after each step. What a step took is the time on the clock and the processor time of
//! the processes of that side between two words. QEMU itself has 9P alone: it is what both of ours are compared with. Its
//! virtiofsd, a process of its own, is measured as well where Debian's qemu-system-common brought it, as root. What is
//! missing is said, and left out.

#[path = "../guest/processor_time.rs"]
mod processor_time;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use ringside::guest::{self, GuestFiles, initramfs};

/// The `ringside` command that this benchmark was built with.
const RINGSIDE: &str = env!("CARGO_BIN_EXE_ringside");
const QEMU: &str = "qemu-system-x86_64";
const VIRTIOFSD: &str = "/usr/lib/qemu/virtiofsd";
/// The port at which init reports the script's status.
const STATUS_PORT: &str = "isa-debug-exit,iobase=0xf4,iosize=4";
/// Folders, and files in each.
const FOLDERS: usize = 100;
const FILES: usize = 100;
/// Bytes of the ext4 file system.
const DISK: u64 = 1 << 30;
/// Rounds; the best of them counts.
const ROUNDS: usize = 2;
/// How long one side may take.
const LIMIT: Duration = Duration::from_secs(900);

/// What the guest does with a folder. `MOUNT` stands for the way to it where init has not mounted it.
const COPY: &str = "grep -q ' /mnt/share ' /proc/mounts || { mkdir -p /mnt/share; MOUNT; } || exit 1
mkdir /mnt/memory; mount -t tmpfs -o size=400m memory /mnt/memory
rm -rf /mnt/share/copy
echo begin
cp -r /mnt/share/tree /mnt/memory/tree && echo read
cp -r /mnt/memory/tree /mnt/share/copy && sync && echo write
[ $(find /mnt/share/copy -type f -size +0 | wc -l) = 10000 ] && echo list
rm -rf /mnt/share/copy && echo remove
";
const COPY_STEPS: &[&str] = &["read", "write", "list", "remove"];
/// What it does with a disk; an archive of the tree is on the second one.
const UNPACK: &str = "modprobe ext4; mkdir -p /mnt/disk; mount -t ext4 /dev/vda /mnt/disk || exit 1
echo begin
tar xf /dev/vdb -C /mnt/disk && sync && echo unpack
[ $(find /mnt/disk/tree -type f -size +0 | wc -l) = 10000 ] && echo list
rm -rf /mnt/disk/tree && sync && echo remove
";
const UNPACK_STEPS: &[&str] = &["unpack", "list", "remove"];
const MOUNT_9P: &str = "modprobe -a 9pnet_virtio 9p; mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=mmap share /mnt/share";
const MOUNT_FS: &str = "modprobe virtiofs; mount -t virtiofs share /mnt/share";

/// One way to give the guest files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    RingsideFs,
    RingsideAlways,
    Ringside9p,
    Qemu9p,
    QemuFs,
    RingsideDisk,
    QemuDisk,
}

/// Sides that do the same; the one that the others are compared with is named.
struct Contest {
    sides: &'static [Side],
    reference: Side,
    steps: &'static [&'static str],
}

const CONTESTS: [Contest; 2] = [
    Contest {
        sides: &[Side::RingsideFs, Side::RingsideAlways, Side::Ringside9p, Side::Qemu9p, Side::QemuFs],
        reference: Side::Qemu9p,
        steps: COPY_STEPS,
    },
    Contest { sides: &[Side::RingsideDisk, Side::QemuDisk], reference: Side::QemuDisk, steps: UNPACK_STEPS },
];

impl Side {
    fn name(self) -> &'static str {
        match self {
            Self::RingsideFs => "ringside, fs",
            Self::RingsideAlways => "ringside, fs, cache=always",
            Self::Ringside9p => "ringside, 9p",
            Self::Qemu9p => "qemu tcg, 9p (-virtfs)",
            Self::QemuFs => "qemu tcg, virtiofsd",
            Self::RingsideDisk => "ringside, ext4 on a disk",
            Self::QemuDisk => "qemu tcg, ext4 on a disk",
        }
    }

    /// Why it cannot be measured here.
    fn missing(self) -> Option<String> {
        let is_qemu = matches!(self, Self::Qemu9p | Self::QemuDisk | Self::QemuFs);
        if is_qemu && Command::new(QEMU).arg("--version").stdout(Stdio::null()).status().is_err() {
            return Some(format!("there is no {QEMU}"));
        }
        match self {
            Self::QemuFs if !Path::new(VIRTIOFSD).exists() => Some(format!("there is no {VIRTIOFSD}")),
            Self::QemuFs if !rustix::process::geteuid().is_root() => Some(format!("{VIRTIOFSD} takes root")),
            _ => None,
        }
    }
}

/// Time on the clock and of the processor.
type Took = (Duration, Duration);

struct Bench {
    guest: GuestFiles,
    folder: tempfile::TempDir,
    ringside: PathBuf,
}

fn main() -> anyhow::Result<()> {
    let guest = guest::fetch("debian", &mut *guest::to_stderr())?;
    let folder =
        tempfile::Builder::new().prefix("ringside-bench.").tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    // A copy: the next build may come while this measures.
    let ringside = folder.path().join("ringside");
    fs::copy(RINGSIDE, &ringside)?;
    let bench = Bench { guest, folder, ringside };
    bench.make_tree()?;
    bench.make_disks()?;
    println!(
        "{FOLDERS} folders of {FILES} files, 1 to 16 KiB; milliseconds of the processor (of the clock), best of {ROUNDS}"
    );
    for contest in &CONTESTS {
        let mut best: BTreeMap<&str, Vec<Took>> = BTreeMap::new();
        let missing =
            |side: &Side| side.missing().inspect(|why| eprintln!("{}: {why}", side.name())).is_some();
        let sides: Vec<Side> = contest.sides.iter().copied().filter(|side| !missing(side)).collect();
        for round in 1..=ROUNDS {
            for &side in &sides {
                eprintln!("round {round} of {ROUNDS}: {}", side.name());
                match bench.run(side, contest.steps) {
                    Ok(took) => keep(best.entry(side.name()).or_default(), took),
                    // The others are measured all the same.
                    Err(error) => eprintln!("{}: {error:#}", side.name()),
                }
            }
        }
        print(contest, &best);
    }
    Ok(())
}

fn keep(best: &mut Vec<Took>, took: Vec<Took>) {
    if best.is_empty() {
        *best = took;
        return;
    }
    for (kept, new) in best.iter_mut().zip(took) {
        *kept = (kept.0.min(new.0), kept.1.min(new.1));
    }
}

/// A line for each side: what each step took, and below it how many times faster it is than the reference.
fn print(contest: &Contest, best: &BTreeMap<&str, Vec<Took>>) {
    println!();
    print!("{:28}", "");
    contest.steps.iter().for_each(|step| print!("{step:>18}"));
    println!("{:>18}", "all");
    let with_sum = |took: &Vec<Took>| {
        let sum = took.iter().fold(Took::default(), |sum, step| (sum.0 + step.0, sum.1 + step.1));
        took.iter().copied().chain([sum]).collect::<Vec<Took>>()
    };
    let reference = best.get(contest.reference.name()).map(with_sum);
    for side in contest.sides {
        let Some(took) = best.get(side.name()).map(with_sum) else {
            println!("{:28} not measured", side.name());
            continue;
        };
        print!("{:28}", side.name());
        for (clock, processor) in &took {
            print!("{:>18}", format!("{} ({})", processor.as_millis(), clock.as_millis()));
        }
        println!();
        let Some(reference) = reference.as_ref().filter(|_| *side != contest.reference) else { continue };
        print!("{:28}", "  times as fast");
        for (own, other) in took.iter().zip(reference) {
            let ratio = |own: Duration, other: Duration| other.as_secs_f64() / own.as_secs_f64();
            print!("{:>18}", format!("{:.2} ({:.2})", ratio(own.1, other.1), ratio(own.0, other.0)));
        }
        println!();
    }
}

impl Bench {
    fn share(&self) -> PathBuf {
        self.folder.path().join("share")
    }

    fn make_tree(&self) -> anyhow::Result<()> {
        let mut state = 1u32;
        for folder in 0..FOLDERS {
            let path = self.share().join(format!("tree/folder{folder}"));
            fs::create_dir_all(&path)?;
            for file in 0..FILES {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let len = 1024 << (state >> 30) | (state >> 8) as usize & 0x3ff;
                fs::write(path.join(format!("file{file}.txt")), vec![state as u8; len])?;
            }
        }
        Ok(())
    }

    fn file(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    /// An archive of the tree, and an empty ext4 file system that a guest makes.
    fn make_disks(&self) -> anyhow::Result<()> {
        let mut archive = tar::Builder::new(fs::File::create(self.file("tree.tar"))?);
        archive.append_dir_all("tree", self.share().join("tree"))?;
        archive.finish()?;
        fs::File::create(self.file("empty"))?.set_len(DISK)?;
        let mut command = Command::new(&self.ringside);
        command.args(["run", "--engine", "soft", "--package", "e2fsprogs", "--disk"]);
        command.arg(format!("path={},format=raw", self.file("empty")));
        let made = command.args(["--exec", "mkfs.ext4 -q -F /dev/vda"]).status()?;
        if !made.success() {
            bail!("no file system could be made");
        }
        Ok(())
    }

    /// The disks of one run: the file system is as it was.
    fn disks(&self) -> anyhow::Result<[String; 2]> {
        fs::copy(self.file("empty"), self.file("disk"))?;
        Ok([self.file("disk"), self.file("tree.tar")])
    }

    /// What a side runs; `helper` becomes the process that it needs beside it.
    fn command(&self, side: Side, helper: &mut Option<Ended>) -> anyhow::Result<Command> {
        Ok(match side {
            Side::RingsideFs => self.ringside(""),
            Side::RingsideAlways => self.ringside(",cache=always"),
            Side::Ringside9p => self.ringside(",as=9p"),
            Side::RingsideDisk => {
                let mut command = Command::new(&self.ringside);
                command.args(["run", "--engine", "soft", "--memory", "1G", "--exec", UNPACK]);
                for disk in self.disks()? {
                    command.arg("--disk").arg(format!("path={disk},format=raw"));
                }
                command
            }
            Side::QemuDisk => {
                let mut command = self.qemu(UNPACK, &[])?;
                for disk in self.disks()? {
                    command.args(["-drive", &format!("file={disk},format=raw,if=virtio,cache=writeback")]);
                }
                command
            }
            Side::Qemu9p => self.qemu(
                &COPY.replace("MOUNT", MOUNT_9P),
                &[
                    "-virtfs",
                    &format!("local,path={},mount_tag=share,security_model=none", self.share().display()),
                ],
            )?,
            Side::QemuFs => {
                let socket = self.folder.path().join("socket");
                *helper = Some(Ended(self.virtiofsd(&socket)?));
                let chardev = format!("socket,id=fs,path={}", socket.display());
                let memory = [
                    "-object",
                    "memory-backend-memfd,id=m,size=1024M,share=on",
                    "-machine",
                    "memory-backend=m",
                ];
                let device = ["-chardev", &chardev, "-device", "vhost-user-fs-pci,chardev=fs,tag=share"];
                self.qemu(&COPY.replace("MOUNT", MOUNT_FS), &[&memory[..], &device].concat())?
            }
        })
    }

    /// One run: what each step took.
    fn run(&self, side: Side, steps: &[&str]) -> anyhow::Result<Vec<Took>> {
        let mut helper = None;
        let mut command = self.command(side, &mut helper)?;
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let mut child = Ended(child);
        let ids: Vec<u32> =
            [Some(child.0.id()), helper.as_ref().map(|helper| helper.0.id())].into_iter().flatten().collect();
        let processor = || ids.iter().filter_map(|&id| processor_time::of_process(id)).sum::<Duration>();
        let lines = lines_of(child.0.stdout.take().context("its output")?);
        let (mut took, mut last, until) = (Vec::new(), None, Instant::now() + LIMIT);
        while took.len() < steps.len() {
            let line = lines.recv_timeout(until.saturating_duration_since(Instant::now()));
            let line = line.with_context(|| format!("the guest came as far as step {}", took.len()))?;
            let now = (Instant::now(), processor());
            if let Some((clock, before)) = last.replace(now) {
                if line.trim() != steps[took.len()] {
                    bail!("the guest said {line:?}");
                }
                took.push((now.0.duration_since(clock), now.1.saturating_sub(before)));
            }
        }
        Ok(took)
    }

    fn ringside(&self, options: &str) -> Command {
        let mut command = Command::new(&self.ringside);
        command.args(["run", "--engine", "soft", "--memory", "1G", "--share"]);
        command.arg(format!("{},tag=share{options}", self.share().display()));
        command.args(["--exec", &COPY.replace("MOUNT", "exit 1")]);
        command
    }

    fn qemu(&self, script: &str, more: &[&str]) -> anyhow::Result<Command> {
        let mut bytes = fs::read(&self.guest.initrd)?;
        bytes.extend(initramfs::exec_overlay(script));
        let initrd = self.folder.path().join("initrd");
        fs::write(&initrd, bytes)?;
        let mut command = Command::new(QEMU);
        command.args(["-accel", "tcg", "-cpu", "max", "-nodefaults", "-no-user-config", "-display", "none"]);
        command.args(["-no-reboot", "-device", STATUS_PORT, "-m", "1024M"]);
        // The script's output comes on the second serial line.
        command.args(["-serial", "null", "-serial", "stdio", "-append", &self.guest.cmdline]);
        command.arg("-kernel").arg(&self.guest.bzimage).arg("-initrd").arg(initrd).args(more);
        Ok(command)
    }

    /// QEMU's server for the folder, when it listens.
    fn virtiofsd(&self, socket: &Path) -> anyhow::Result<Child> {
        let _ = fs::remove_file(socket);
        let mut command = Command::new(VIRTIOFSD);
        command.arg(format!("--socket-path={}", socket.display()));
        command.args(["-o", &format!("source={}", self.share().display()), "-o", "cache=auto"]);
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let until = Instant::now() + Duration::from_secs(10);
        while !socket.exists() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(child)
    }
}

/// The lines that a guest says, as they come.
fn lines_of(output: ChildStdout) -> Receiver<String> {
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    lines
}

/// A process that ends with the run.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
