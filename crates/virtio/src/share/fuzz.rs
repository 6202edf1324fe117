//! Requests of Linux's drivers, changed at random, sent from several threads while somebody moves the host's files: whatever
//! comes is answered or refused, stays in the folder, and leaves nothing behind.
//!
//! `RINGSIDE_FUZZ_SECONDS` goes on for longer than a test does, `RINGSIDE_SEED` begins elsewhere.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::serve::{Reply, Server};
use super::testing::{Place, Random, SETTINGS, descriptors_below, send};
use super::{Folder, Settings};

/// Requests that a thread sends to one server.
const REQUESTS: usize = 600;
/// Threads that send.
const SENDERS: u64 = 3;
/// The most bytes of a changed request.
const MAX_REQUEST: usize = 4096;
/// The longest answer that any request can have.
const MAX_ANSWER: usize = 2 << 20;

/// A protocol.
pub(crate) struct Protocol<'a> {
    /// Makes its server.
    pub(crate) server: &'a (dyn Fn(Folder) -> Box<dyn Server> + Sync),
    /// Requests in hexadecimal, one a line; a line may be a comment.
    pub(crate) corpus: &'a str,
    /// How many of them begin a session.
    pub(crate) prelude: usize,
    /// Makes a request's length right again, and keeps it from filling the host's disk.
    pub(crate) mend: fn(&mut Vec<u8>),
    /// Holds an answer against what each must be.
    pub(crate) check: fn(&[u8], &[u8]),
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn messages(corpus: &str) -> Vec<Vec<u8>> {
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    let lines = corpus.lines().filter(|line| !line.starts_with('#'));
    lines.map(|line| line.as_bytes().chunks(2).map(byte).collect()).collect()
}

/// Sends changed requests for a while.
pub(crate) fn exercise(protocol: &Protocol<'_>) {
    let corpus = messages(protocol.corpus);
    let end = Instant::now() + Duration::from_secs(number("RINGSIDE_FUZZ_SECONDS", 2));
    let answered = AtomicU64::new(0);
    for seed in number("RINGSIDE_SEED", 1).. {
        session(protocol, &corpus, seed, &answered);
        if Instant::now() > end {
            break;
        }
    }
    assert!(answered.into_inner() > 500, "most are answered");
}

fn session(protocol: &Protocol<'_>, corpus: &[Vec<u8>], seed: u64, answered: &AtomicU64) {
    let place = Place::new();
    std::fs::create_dir(place.path("d")).unwrap();
    for name in ["a", "b", "d/a"] {
        std::fs::write(place.path(name), name).unwrap();
    }
    std::os::unix::fs::symlink(place.outside(""), place.path("e")).unwrap();
    let settings = Settings { keep_all: seed.is_multiple_of(2), ..SETTINGS };
    let server = (protocol.server)(place.share_with(settings));
    for message in &corpus[..protocol.prelude] {
        send(&*server, message).expect("a session begins");
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let senders: Vec<_> = (0..SENDERS)
            .map(|number| {
                let mut random = Random((seed * SENDERS + number).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
                let (server, protocol) = (&*server, &protocol);
                scope.spawn(move || sender(server, protocol, corpus, &mut random, answered))
            })
            .collect();
        scope.spawn(|| {
            let mut random = Random(seed | 1 << 40);
            while !stop.load(Ordering::Relaxed) {
                disturb(&place, &mut random);
            }
        });
        let ended: Vec<_> = senders.into_iter().map(|sender| sender.join()).collect();
        stop.store(true, Ordering::Relaxed);
        assert!(ended.iter().all(Result::is_ok), "seed {seed}");
    });
    assert!(descriptors_below(&place.path("")) <= SETTINGS.descriptors, "seed {seed}");
    place.check_outside();
    server.reset();
    assert_eq!(descriptors_below(&place.path("")), 1, "seed {seed}: a new session holds nothing");
}

fn sender(
    server: &dyn Server,
    protocol: &Protocol<'_>,
    corpus: &[Vec<u8>],
    random: &mut Random,
    answered: &AtomicU64,
) {
    let mut next = random.below(corpus.len() as u64) as usize;
    for _ in 0..REQUESTS {
        // Mostly in their order, in which they mean something.
        next = if random.below(8) == 0 { random.below(corpus.len() as u64) as usize } else { next + 1 };
        let mut request = corpus[next % corpus.len()].clone();
        if random.below(3) != 0 {
            for _ in 0..=random.below(3) {
                change(&mut request, random);
            }
        }
        request.truncate(MAX_REQUEST);
        (protocol.mend)(&mut request);
        match send(server, &request) {
            Ok(answer) => {
                assert!(answer.len() <= MAX_ANSWER);
                (protocol.check)(&request, &answer);
                answered.fetch_add(1, Ordering::Relaxed);
            }
            Err(Reply::Bytes { .. }) => panic!("bytes are an answer"),
            Err(_) => {}
        }
    }
}

fn change(request: &mut Vec<u8>, random: &mut Random) {
    const NUMBERS: [u64; 14] =
        [0, 1, 2, 3, 16, 17, 255, 4096, 0xffff, 1 << 20, 1 << 31, u32::MAX as u64, i64::MAX as u64, u64::MAX];
    const NAMES: [&[u8]; 9] =
        [b"..", b".", b"/", b"a/../..", b"e", b"d", b"user.ringside.owner", b"\n", &[b'n'; 300]];
    let at = random.below(request.len() as u64 + 1) as usize;
    let put = |request: &mut Vec<u8>, at: usize, bytes: &[u8]| {
        let end = (at + bytes.len()).min(request.len());
        request[at..end].copy_from_slice(&bytes[..end - at]);
    };
    match random.below(8) {
        0 => {
            let value = random.next() as u8;
            put(request, at, &[value]);
        }
        1 | 2 => {
            let (value, len) = (random.of(&NUMBERS).to_le_bytes(), random.of(&[1, 2, 4, 8]));
            put(request, at & !3, &value[..len]);
        }
        3 => {
            let value = random.below(40).to_le_bytes();
            put(request, at & !7, &value);
        }
        4 => request.truncate(at),
        5 => request.extend((0..random.below(200)).map(|index| index as u8)),
        6 => {
            let name = random.of(&NAMES);
            put(request, at, name);
        }
        _ => {
            let name = random.of(&NAMES);
            request.splice(at..at, name.iter().copied());
        }
    }
}

/// Somebody moves the host's files, without following links themselves.
fn disturb(place: &Place, random: &mut Random) {
    let [one, other] = [(); 2].map(|()| place.path(random.of(&["a", "b", "c", "d", "e", "q"])));
    match random.below(6) {
        0 => drop(std::fs::remove_file(one)),
        1 => drop(std::os::unix::fs::symlink(place.outside("secret"), one)),
        2 => drop(std::fs::create_dir(one)),
        3 => drop(std::fs::File::create_new(one)),
        _ => {
            let exchange = rustix::fs::RenameFlags::EXCHANGE;
            let _ = rustix::fs::renameat_with(rustix::fs::CWD, one, rustix::fs::CWD, other, exchange);
        }
    }
}
