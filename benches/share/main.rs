//! A tree of 10,000 files over a shared folder: read, written, listed and removed by Debian in Ringside and in QEMU's TCG.
//!
//! The guest's script prints a word after each step. What a step took is the time on the clock and the processor time of
//! the processes of that side (QEMU's virtiofsd is one of its own) between two words.

#[path = "../guest/processor_time.rs"]
mod processor_time;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
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
/// Rounds; the best of them counts.
const ROUNDS: usize = 2;
const STEPS: [&str; 4] = ["read", "write", "list", "remove"];

/// What the guest does. `MOUNT` stands for the way to the folder where init has not mounted it.
const SCRIPT: &str = "grep -q ' /mnt/share ' /proc/mounts || { mkdir -p /mnt/share; MOUNT; } || exit 1
mkdir /mnt/memory; mount -t tmpfs -o size=400m memory /mnt/memory
echo begin
cp -r /mnt/share/tree /mnt/memory/tree && echo read
cp -r /mnt/memory/tree /mnt/share/copy && sync && echo write
[ $(find /mnt/share/copy -type f -size +0 | wc -l) = 10000 ] && echo list
rm -rf /mnt/share/copy && echo remove
";
const MOUNT_9P: &str =
    "modprobe -a 9pnet_virtio 9p; mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000 share /mnt/share";
const MOUNT_FS: &str = "modprobe virtiofs; mount -t virtiofs share /mnt/share";

/// One way to share the folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    RingsideFs,
    RingsideAlways,
    Ringside9p,
    Qemu9p,
    QemuFs,
}

const SIDES: [Side; 5] =
    [Side::RingsideFs, Side::RingsideAlways, Side::Ringside9p, Side::Qemu9p, Side::QemuFs];

impl Side {
    fn name(self) -> &'static str {
        match self {
            Self::RingsideFs => "ringside, fs",
            Self::RingsideAlways => "ringside, fs, cache=always",
            Self::Ringside9p => "ringside, 9p",
            Self::Qemu9p => "qemu tcg, 9p (-virtfs)",
            Self::QemuFs => "qemu tcg, virtiofsd",
        }
    }

    /// Whether its programs are here.
    fn is_there(self) -> bool {
        let qemu = || Command::new(QEMU).arg("--version").stdout(Stdio::null()).status().is_ok();
        match self {
            Self::Qemu9p => qemu(),
            Self::QemuFs => qemu() && Path::new(VIRTIOFSD).exists() && rustix::process::geteuid().is_root(),
            _ => true,
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
    let mut best: BTreeMap<(usize, usize), Took> = BTreeMap::new();
    for round in 1..=ROUNDS {
        for (row, side) in SIDES.into_iter().enumerate().filter(|(_, side)| side.is_there()) {
            eprintln!("round {round} of {ROUNDS}: {}", side.name());
            for (column, took) in bench.run(side).with_context(|| side.name())?.into_iter().enumerate() {
                let kept = best.entry((row, column)).or_insert(took);
                *kept = (kept.0.min(took.0), kept.1.min(took.1));
            }
        }
    }
    print(&best);
    Ok(())
}

fn print(best: &BTreeMap<(usize, usize), Took>) {
    println!(
        "{FOLDERS} folders of {FILES} files, 1 to 16 KiB; milliseconds of the processor (of the clock), best of {ROUNDS}"
    );
    print!("{:28}", "");
    STEPS.iter().for_each(|step| print!("{step:>18}"));
    println!("{:>12}", "x 9p of qemu");
    let reference = SIDES.iter().position(|&side| side == Side::Qemu9p).unwrap_or(0);
    let total = |row| {
        (0..STEPS.len())
            .filter_map(|step| best.get(&(row, step)))
            .map(|took| took.1.as_secs_f64())
            .sum::<f64>()
    };
    for (row, side) in SIDES.iter().enumerate() {
        if !best.contains_key(&(row, 0)) {
            println!("{:28} not here", side.name());
            continue;
        }
        print!("{:28}", side.name());
        for step in 0..STEPS.len() {
            let (clock, processor) = best[&(row, step)];
            print!("{:>18}", format!("{} ({})", processor.as_millis(), clock.as_millis()));
        }
        println!("{:>12.2}", total(reference) / total(row));
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

    /// One run: what each step took.
    fn run(&self, side: Side) -> anyhow::Result<Vec<Took>> {
        let mut helper = None;
        let mut command = match side {
            Side::RingsideFs => self.ringside(""),
            Side::RingsideAlways => self.ringside(",cache=always"),
            Side::Ringside9p => self.ringside(",as=9p"),
            Side::Qemu9p => self.qemu(
                MOUNT_9P,
                &[
                    "-virtfs",
                    &format!("local,path={},mount_tag=share,security_model=none", self.share().display()),
                ],
            )?,
            Side::QemuFs => {
                let socket = self.folder.path().join("socket");
                helper = Some(Ended(self.virtiofsd(&socket)?));
                let chardev = format!("socket,id=fs,path={}", socket.display());
                let memory = [
                    "-object",
                    "memory-backend-memfd,id=m,size=1024M,share=on",
                    "-machine",
                    "memory-backend=m",
                ];
                let device = ["-chardev", &chardev, "-device", "vhost-user-fs-pci,chardev=fs,tag=share"];
                self.qemu(MOUNT_FS, &[&memory[..], &device].concat())?
            }
        };
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let mut child = Ended(child);
        let ids: Vec<u32> =
            [Some(child.0.id()), helper.as_ref().map(|helper| helper.0.id())].into_iter().flatten().collect();
        let processor = || ids.iter().filter_map(|&id| processor_time::of_process(id)).sum::<Duration>();
        let output = BufReader::new(child.0.stdout.take().context("its output")?);
        let (mut took, mut last) = (Vec::new(), None);
        for line in output.lines() {
            let (line, now) = (line?, (Instant::now(), processor()));
            if let Some((clock, before)) = last.replace(now) {
                if line.trim() != STEPS[took.len()] {
                    bail!("the guest said {line:?}");
                }
                took.push((now.0.duration_since(clock), now.1.saturating_sub(before)));
                if took.len() == STEPS.len() {
                    break;
                }
            }
        }
        if took.len() < STEPS.len() {
            bail!("the guest did not come to its end: {} steps", took.len());
        }
        Ok(took)
    }

    fn ringside(&self, options: &str) -> Command {
        let mut command = Command::new(&self.ringside);
        command.args(["run", "--engine", "soft", "--memory", "1G", "--share"]);
        command.arg(format!("{},tag=share{options}", self.share().display()));
        command.args(["--exec", &SCRIPT.replace("MOUNT", "exit 1")]);
        command
    }

    fn qemu(&self, mount: &str, more: &[&str]) -> anyhow::Result<Command> {
        let mut bytes = fs::read(&self.guest.initrd)?;
        bytes.extend(initramfs::exec_overlay(&SCRIPT.replace("MOUNT", mount)));
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

/// A process that ends with the run.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
