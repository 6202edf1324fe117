//! The block device with a driver's mock on its other side: no guest, a raw image in the host's page cache, one queue.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use anyhow::ensure;
use disk::Format;
use virtio::block::{Block, BlockOptions, Limits};
use virtio::features::{EVENT_IDX, INDIRECT_DESC};
use virtio::testing::{BUFFERS, Rig};

/// Bytes of a request, and of the image.
const BLOCK: u64 = 4096;
const IMAGE: u64 = 16 << 20;
/// Requests that are made available at a time, and on their way at most.
const BATCH: u64 = 64;
const DEPTH: u64 = 192;
const REQUESTS: u64 = 64 * 1000;
/// Runs of each kind: on a busy host most of them are disturbed.
const RUNS: usize = 10;
/// Where the requests' data are in guest memory.
const DATA: u64 = BUFFERS + 0x10_0000;
/// Kinds of requests.
const IN: u32 = 0;
const OUT: u32 = 1;

/// Measures and prints.
pub fn measure(folder: &Path) -> anyhow::Result<()> {
    let path = folder.join("device.img");
    fs::write(&path, vec![7; IMAGE as usize])?;
    println!(
        "the device alone: {BLOCK} bytes a request, one queue, a raw image of {} MiB in the page cache; best of {RUNS}",
        IMAGE >> 20
    );
    println!(
        "{:<18} {:>22} {:>22} {:>12} {:>18}",
        "", "driver's thread alone", "of its processor time", "and a worker", "bare pread, pwrite"
    );
    for (name, kind, random) in [
        ("sequential reads", IN, false),
        ("random reads", IN, true),
        ("sequential writes", OUT, false),
        ("random writes", OUT, true),
    ] {
        let best = |threads: bool| -> anyhow::Result<(f64, f64)> {
            (0..RUNS).try_fold((0.0f64, 0.0f64), |best, _| {
                let (wall, processor) = run(&path, (kind, random), threads)?;
                Ok((best.0.max(wall), best.1.max(processor)))
            })
        };
        let ((alone, processor), (worker, _)) = (best(false)?, best(true)?);
        let bare = (0..RUNS).try_fold(0.0f64, |best, _| anyhow::Ok(best.max(bare(&path, kind, random)?)))?;
        let [alone, processor, worker, bare] =
            [alone, processor, worker, bare].map(|rate| format!("{:.2} M/s", rate / 1e6));
        println!("{name:<18} {alone:>22} {processor:>22} {worker:>12} {bare:>18}");
    }
    println!();
    Ok(())
}

/// Requests a second, and a second of the driver's processor time, with a worker's thread or without.
fn run(path: &Path, (kind, random): (u32, bool), threads: bool) -> anyhow::Result<(f64, f64)> {
    let image = disk::Options { format: Some(Format::Raw), ..disk::Options::new(path) };
    let (label, serial) = ("bench".to_owned(), String::new());
    let limits = Limits::default();
    let block = Block::new(BlockOptions { disk: disk::open(&image)?, label, serial, queues: 1, limits });
    let block = if threads { block } else { block.without_threads() };
    // With flushes, or each write would have to be durable by itself.
    const FLUSH: u64 = 1 << 9;
    let mut rig = Rig::new(Box::new(block), 256, INDIRECT_DESC | EVENT_IDX | FLUSH);
    let (start, processor) = (Instant::now(), processor_time());
    let (mut sent, mut done) = (0, 0);
    let mut blocks = Blocks { random, next: 1 };
    while done < REQUESTS {
        if sent < REQUESTS && sent - done + BATCH <= DEPTH {
            for _ in 0..BATCH {
                send(&mut rig, kind, blocks.take(), sent % 256);
                sent += 1;
            }
            rig.notify(0);
        }
        let mut came = false;
        while rig.drivers[0].used().is_some() {
            done += 1;
            came = true;
        }
        if !came {
            ensure!(rig.status().bits() == 0xf, "the device is broken");
            std::hint::spin_loop();
        }
    }
    let rate = |seconds: f64| done as f64 / seconds;
    Ok((rate(start.elapsed().as_secs_f64()), rate(processor_time() - processor)))
}

/// The same blocks by a system call each, a second of processor time: what the host asks for them at least.
fn bare(path: &Path, kind: u32, random: bool) -> anyhow::Result<f64> {
    let file = File::options().read(true).write(true).open(path)?;
    let mut blocks = Blocks { random, next: 1 };
    let mut memory = vec![7; 256 * BLOCK as usize];
    let start = processor_time();
    for request in 0..REQUESTS {
        let data = &mut memory[(request % 256 * BLOCK) as usize..][..BLOCK as usize];
        let offset = blocks.take() * BLOCK;
        match kind {
            IN => file.read_exact_at(data, offset)?,
            _ => file.write_all_at(data, offset)?,
        }
    }
    Ok(REQUESTS as f64 / (processor_time() - start))
}

/// Which blocks are asked for, the same ones each time.
struct Blocks {
    random: bool,
    next: u64,
}

impl Blocks {
    fn take(&mut self) -> u64 {
        let next = self.next;
        self.next = match self.random {
            true => next.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1),
            false => next + 1,
        };
        (if self.random { next >> 33 } else { next }) % (IMAGE / BLOCK)
    }
}

fn send(rig: &mut Rig, kind: u32, block: u64, slot: u64) {
    let (header, status, data) = (BUFFERS + 32 * slot, BUFFERS + 0x1_0000 + slot, DATA + BLOCK * slot);
    let driver = &mut rig.drivers[0];
    driver.put(header, &(u128::from(kind) | u128::from(block * (BLOCK / 512)) << 64).to_le_bytes());
    driver.send(&[(header, 16, false), (data, BLOCK as u32, kind == IN), (status, 1, true)], true);
}

/// Seconds of processor time of this thread.
fn processor_time() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
