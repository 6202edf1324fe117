//! The block device with a driver's mock on its other side: no guest, a raw image in the host's page cache, one queue.

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
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
const REQUESTS: u64 = 300_000;
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
        "the device alone, {BLOCK} bytes a request, one queue, a raw image of {} MiB in the page cache",
        IMAGE >> 20
    );
    println!("{:<18} {:>14} {:>26}", "", "requests/s", "worker's time a request");
    for (name, kind, random) in [
        ("sequential reads", IN, false),
        ("random reads", IN, true),
        ("sequential writes", OUT, false),
        ("random writes", OUT, true),
    ] {
        // The first one only warms up.
        run(&path, kind, random, REQUESTS / 10)?;
        let (rate, processor) = run(&path, kind, random, REQUESTS)?;
        println!("{name:<18} {:>10.2} M/s {processor:>23.0} ns", rate / 1e6);
    }
    println!();
    Ok(())
}

/// Requests a second, and nanoseconds of the worker's processor time for each.
fn run(path: &Path, kind: u32, random: bool, requests: u64) -> anyhow::Result<(f64, f64)> {
    let image = disk::Options { format: Some(Format::Raw), ..disk::Options::new(path) };
    let (label, serial) = ("bench".to_owned(), String::new());
    let limits = Limits::default();
    let block = Block::new(BlockOptions { disk: disk::open(&image)?, label, serial, queues: 1, limits });
    // With flushes, or each write would have to be durable by itself.
    const FLUSH: u64 = 1 << 9;
    let mut rig = Rig::new(Box::new(block), 256, INDIRECT_DESC | EVENT_IDX | FLUSH);
    let start = Instant::now();
    let (mut sent, mut done) = (0, 0);
    let mut random_state = 1u64;
    while done < requests {
        if sent < requests && sent - done + BATCH <= DEPTH {
            for _ in 0..BATCH {
                random_state = random_state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                let block = if random { random_state >> 33 } else { sent };
                send(&mut rig, kind, block % (IMAGE / BLOCK), sent % 256);
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
    let (elapsed, processor) = (start.elapsed().as_secs_f64(), worker_time()?);
    Ok((done as f64 / elapsed, processor / done as f64))
}

fn send(rig: &mut Rig, kind: u32, block: u64, slot: u64) {
    let (header, status, data) = (BUFFERS + 32 * slot, BUFFERS + 0x1_0000 + slot, DATA + BLOCK * slot);
    let driver = &mut rig.drivers[0];
    driver.put(header, &(u128::from(kind) | u128::from(block * (BLOCK / 512)) << 64).to_le_bytes());
    driver.send(&[(header, 16, false), (data, BLOCK as u32, kind == IN), (status, 1, true)], true);
}

/// Nanoseconds that the queue's worker has run.
fn worker_time() -> anyhow::Result<f64> {
    for task in fs::read_dir("/proc/self/task")? {
        let task = task?.path();
        if fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim().starts_with("blk-queue")) {
            let times = fs::read_to_string(task.join("schedstat"))?;
            return Ok(times.split(' ').next().context("a time")?.parse()?);
        }
    }
    bail!("the device has no worker")
}
