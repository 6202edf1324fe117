//! Random bytes as code, in every mode: whatever they do, the run ends in a way that has a name.
//!
//! The bytes are the same in every run. `RINGSIDE_SEEDS=100..200` tries others.

mod common;

use std::process::Stdio;
use std::time::Duration;

use common::guest::{End, Guest, Random, assemble, machine};
use common::trials::{self, DONE, PIECE};
use common::{finish, stderr};
use iced_x86::code_asm::*;
use rustix::process::{Pid, Signal, kill_process};

/// How long random code may run before it is ended: it may well switch off the timer.
const ENOUGH: Duration = Duration::from_millis(1500);

/// Runs a guest that need not end by itself.
fn run_for_a_while(guest: &Guest) -> End {
    let file = guest.file();
    let child = machine(&file).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("ringside starts");
    let pid = Pid::from_child(&child);
    let (done, wait) = std::sync::mpsc::channel::<()>();
    let watch = std::thread::spawn(move || {
        if wait.recv_timeout(ENOUGH).is_err() {
            let _ = kill_process(pid, Signal::TERM);
        }
    });
    let output = finish(child, Duration::from_secs(30));
    let _ = done.send(());
    watch.join().expect("the watch");
    End { status: output.status.code(), message: stderr(&output) }
}

fn random_pieces(seed: u64, count: usize) -> Vec<Vec<u8>> {
    let mut random = Random::new(seed);
    (0..count).map(|_| random.bytes(PIECE - 2)).collect()
}

/// Mnemonics that random bytes hardly meet: two-byte opcodes, also behind the prefixes that make vector instructions.
fn unlikely_pieces(seed: u64, count: usize) -> Vec<Vec<u8>> {
    let mut random = Random::new(seed);
    let begins: &[&[u8]] = &[
        &[0x0f],
        &[0x66, 0x0f],
        &[0xf3, 0x0f],
        &[0xf2, 0x0f],
        &[0x48, 0x0f],
        &[0xc5],
        &[0xc4],
        &[0x62],
        &[0xf0],
    ];
    (0..count)
        .map(|index| {
            let mut piece = Vec::new();
            while piece.len() < PIECE - 2 - 12 {
                piece.extend_from_slice(begins[(index + piece.len()) % begins.len()]);
                piece.extend(random.bytes(7));
            }
            piece
        })
        .collect()
}

fn seeds() -> std::ops::Range<u64> {
    let Ok(range) = std::env::var("RINGSIDE_SEEDS") else { return 1..6 };
    let (first, end) = range.split_once("..").expect("a range");
    first.parse().expect("a number")..end.parse().expect("a number")
}

fn ends_with_a_name(guest: impl Fn(&[Vec<u8>]) -> Guest, count: usize) {
    for seed in seeds() {
        for (kind, pieces) in
            [("any", random_pieces(seed, count)), ("unlikely", unlikely_pieces(seed, count))]
        {
            let end = run_for_a_while(&guest(&pieces));
            println!("seed {seed}, {kind}: {end:?}");
            end.has_a_name();
        }
    }
}

#[test]
fn faults_and_endless_loops_lead_to_the_next_piece_in_every_mode() {
    let piece = |bits| {
        [
            vec![],
            // Interrupts off, for ever.
            vec![0xfa, 0xeb, 0xfe],
            assemble(bits, 0, |a| {
                a.cli()?;
                a.hlt()
            }),
            assemble(bits, 0, |a| a.int3()),
            assemble(bits, 0, |a| a.hlt()),
            vec![0xeb, 0xfe],
            assemble(bits, 0, |a| {
                a.xor(ecx, ecx)?;
                a.div(ecx)
            }),
            assemble(bits, 0, |a| a.int(0x80)),
        ]
    };
    trials::real(&piece(16)).run().is(DONE, &[]);
    trials::protected(&piece(32)).run().is(DONE, &[]);
    trials::long(&piece(64)).run().is(DONE, &[]);
}

#[test]
fn random_bytes_in_real_mode_end_with_a_name() {
    ends_with_a_name(trials::real, trials::REAL_MOST);
}

#[test]
fn random_bytes_in_protected_mode_end_with_a_name() {
    ends_with_a_name(trials::protected, 3000);
}

#[test]
fn random_bytes_in_64_bit_mode_end_with_a_name() {
    ends_with_a_name(trials::long, 3000);
}

/// More rounds than it takes for code to be translated.
const MANY: u32 = 40;

#[test]
fn random_bytes_that_become_hot_end_with_a_name() {
    ends_with_a_name(|pieces| trials::long_again(pieces, MANY, 0x100_0000), 400);
}

#[test]
fn random_bytes_that_overwrite_each_other_end_with_a_name() {
    ends_with_a_name(|pieces| trials::long_again(pieces, MANY, trials::PIECES), 400);
}
