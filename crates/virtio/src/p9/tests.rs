use std::time::{Duration, Instant};

use super::server::P9Server;
use super::wire::*;
use crate::Device;
use crate::share::serve::{Reply, Server};
use crate::share::testing::{Place, Random, SETTINGS, descriptors_below, send};
use crate::share::{Errno, Settings};

/// A message with this body.
fn message(kind: u8, body: Out) -> Vec<u8> {
    let mut out = Out::default().u32((HEADER + body.0.len()) as u32).u8(kind).u16(5);
    out.0.extend_from_slice(&body.0);
    out.0
}

fn out() -> Out {
    Out::default()
}

/// A guest's side: fid 0 is the folder.
struct Client(P9Server);

impl Client {
    fn new(place: &Place) -> Self {
        Self::of(P9Server::new(place.share()))
    }

    fn of(server: P9Server) -> Self {
        let client = Self(server);
        let version = client.ask(kind_of::VERSION, out().u32(1 << 16).text(b"9P2000.L")).unwrap();
        assert_eq!(version, out().u32(1 << 16).text(b"9P2000.L").0);
        client.ask(kind_of::ATTACH, out().u32(0).u32(u32::MAX).text(b"").text(b"").u32(1000)).unwrap();
        client
    }

    /// The answer's body, or the error.
    fn ask(&self, kind: u8, body: Out) -> Result<Vec<u8>, Errno> {
        let answer = send(&self.0, &message(kind, body)).expect("an answer");
        let mut fields = Fields(&answer);
        assert_eq!(fields.u32().unwrap() as usize, answer.len());
        let (got, tag) = (fields.u8().unwrap(), fields.u16().unwrap());
        assert_eq!(tag, 5);
        if got == kind_of::LERROR + 1 {
            return Err(Errno::from_raw_os_error(fields.u32().unwrap() as i32));
        }
        assert_eq!(got, kind + 1);
        Ok(fields.0.to_vec())
    }

    fn walk(&self, from: u32, to: u32, names: &[&str]) -> Result<usize, Errno> {
        let body =
            names.iter().fold(out().u32(from).u32(to).u16(names.len() as u16), |b, n| b.text(n.as_bytes()));
        let answer = self.ask(kind_of::WALK, body)?;
        let count = Fields(&answer).u16()?.into();
        assert_eq!(answer.len(), 2 + 13 * count);
        Ok(count)
    }

    /// Makes a file, open as `fid`.
    fn create(&self, fid: u32, name: &str) -> Result<Vec<u8>, Errno> {
        self.walk(0, fid, &[]).unwrap();
        self.ask(kind_of::LCREATE, out().u32(fid).text(name.as_bytes()).u32(2).u32(0o644).u32(100))
    }
}

#[test]
fn another_version_is_unknown_and_small_messages_are_refused() {
    let place = Place::new();
    let client = Client::new(&place);
    let other = client.ask(kind_of::VERSION, out().u32(8192).text(b"9P2000")).unwrap();
    assert_eq!(other, out().u32(8192).text(b"unknown").0);
    assert_eq!(client.ask(kind_of::VERSION, out().u32(100).text(b"9P2000.L")), Err(Errno::MSGSIZE));
    let most = client.ask(kind_of::VERSION, out().u32(u32::MAX).text(b"9P2000.L")).unwrap();
    assert_eq!(Fields(&most).u32(), Ok(1 << 20));
    assert_eq!(client.walk(0, 1, &[]), Err(Errno::BADF), "a new session knows no fid");
}

#[test]
fn a_file_is_made_written_read_listed_and_removed() {
    let place = Place::new();
    let client = Client::new(&place);
    client.create(1, "f").unwrap();
    let mut write = out().u32(1).u64(2).u32(5);
    write.0.extend_from_slice(b"hello");
    assert_eq!(client.ask(kind_of::WRITE, write), Ok(out().u32(5).0));
    let read = client.ask(kind_of::READ, out().u32(1).u64(0).u32(100)).unwrap();
    assert_eq!(read, [&7u32.to_le_bytes()[..], b"\0\0hello"].concat());
    let attributes = client.ask(kind_of::GETATTR, out().u32(1).u64(BASIC)).unwrap();
    let mut fields = Fields(&attributes[21..]);
    assert_eq!((fields.u32(), fields.u32(), fields.u32()), (Ok(0o100_644), Ok(1000), Ok(100)));
    client.walk(0, 2, &[]).unwrap();
    client.ask(kind_of::LOPEN, out().u32(2).u32(0)).unwrap();
    let list = client.ask(kind_of::READDIR, out().u32(2).u64(0).u32(4000)).unwrap();
    let mut fields = Fields(&list[4..]);
    let mut names = Vec::new();
    while !fields.0.is_empty() {
        fields.0 = &fields.0[13 + 8 + 1..];
        names.push(fields.text().unwrap().to_vec());
    }
    names.sort();
    assert_eq!(names, [&b"."[..], b"..", b"f"]);
    client.ask(kind_of::REMOVE, out().u32(1)).unwrap();
    assert!(!place.path("f").exists());
    assert_eq!(client.ask(kind_of::CLUNK, out().u32(1)), Err(Errno::BADF));
}

#[test]
fn walks_go_as_far_as_they_can_and_never_above_the_folder() {
    let place = Place::new();
    let client = Client::new(&place);
    std::fs::create_dir_all(place.path("a/b")).unwrap();
    std::os::unix::fs::symlink(place.outside(""), place.path("link")).unwrap();
    assert_eq!(client.walk(0, 1, &["a", "b", "..", ".."]), Ok(4));
    assert_eq!(client.walk(1, 2, &["..", "..", "a"]), Ok(3), "above the folder is the folder");
    assert_eq!(client.walk(0, 3, &["a", "x", "y"]), Ok(1));
    assert_eq!(client.ask(kind_of::CLUNK, out().u32(3)), Err(Errno::BADF), "a walk cut short gives no fid");
    assert_eq!(client.walk(0, 3, &["..", "outside"]), Ok(1));
    assert_eq!(client.walk(0, 3, &["link", "secret"]), Ok(1), "a link is no folder");
    assert_eq!(client.walk(0, 3, &["a/b"]), Err(Errno::INVAL));
    assert_eq!(client.walk(0, 1, &["a"]), Err(Errno::BADF), "the fid is in use");
    assert_eq!(client.walk(0, 9, &["a"; 17]), Err(Errno::INVAL));
    client.walk(0, 4, &["link"]).unwrap();
    assert_eq!(client.ask(kind_of::LOPEN, out().u32(4).u32(0)), Err(Errno::LOOP));
}

#[test]
fn attributes_are_written_when_their_fid_is_given_back() {
    let place = Place::new();
    let client = Client::new(&place);
    client.create(1, "f").unwrap();
    client.walk(0, 2, &["f"]).unwrap();
    client.ask(kind_of::XATTRCREATE, out().u32(2).text(b"user.a").u64(6).u32(0)).unwrap();
    for (offset, part) in [(0, b"abc"), (3, b"def")] {
        let mut write = out().u32(2).u64(offset).u32(3);
        write.0.extend_from_slice(part);
        client.ask(kind_of::WRITE, write).unwrap();
    }
    assert_eq!(
        client.ask(kind_of::WRITE, out().u32(2).u64(6).u32(1).u8(0)),
        Err(Errno::INVAL),
        "more than it said"
    );
    client.ask(kind_of::CLUNK, out().u32(2)).unwrap();
    assert_eq!(client.ask(kind_of::XATTRWALK, out().u32(1).u32(3).text(b"user.a")), Ok(out().u64(6).0));
    let value = client.ask(kind_of::READ, out().u32(3).u64(1).u32(100)).unwrap();
    assert_eq!(&value[4..], b"bcdef");
    assert_eq!(client.ask(kind_of::XATTRWALK, out().u32(1).u32(4).text(b"")), Ok(out().u64(7).0));
    assert_eq!(client.ask(kind_of::XATTRWALK, out().u32(1).u32(5).text(b"user.b")), Err(Errno::NODATA));
}

#[test]
fn names_move_and_files_have_several() {
    let place = Place::new();
    let client = Client::new(&place);
    client.create(1, "f").unwrap();
    client.ask(kind_of::MKDIR, out().u32(0).text(b"d").u32(0o755).u32(0)).unwrap();
    client.walk(0, 2, &["d"]).unwrap();
    client.ask(kind_of::RENAMEAT, out().u32(0).text(b"f").u32(2).text(b"g")).unwrap();
    client.ask(kind_of::LINK, out().u32(0).u32(1).text(b"h")).unwrap();
    client.ask(kind_of::RENAME, out().u32(1).u32(2).text(b"i")).unwrap();
    client.ask(kind_of::SYMLINK, out().u32(0).text(b"s").text(b"d/g").u32(0)).unwrap();
    client.walk(0, 3, &["s"]).unwrap();
    assert_eq!(client.ask(kind_of::READLINK, out().u32(3)), Ok(out().text(b"d/g").0));
    let names = |path| std::fs::read_dir(place.path(path)).unwrap().count();
    assert_eq!((names(""), names("d")), (2, 2));
    client.ask(kind_of::UNLINKAT, out().u32(2).text(b"g").u32(0)).unwrap();
    client.ask(kind_of::UNLINKAT, out().u32(2).text(b"i").u32(0)).unwrap();
    client.ask(kind_of::UNLINKAT, out().u32(0).text(b"d").u32(0x200)).unwrap();
    assert_eq!(names(""), 1);
}

#[test]
fn locks_are_had_refused_and_waited_for() {
    let place = Place::new();
    let client = Client::new(&place);
    client.create(1, "f").unwrap();
    let lock =
        |kind, flags, process: u32| out().u32(1).u8(kind).u32(flags).u64(0).u64(0).u32(process).text(b"host");
    assert_eq!(client.ask(kind_of::LOCK, lock(lock::EXCLUSIVE, 0, 1)), Ok(vec![lock::SUCCESS]));
    assert_eq!(client.ask(kind_of::LOCK, lock(lock::SHARED, 0, 2)), Ok(vec![lock::BLOCKED]));
    let wait = message(kind_of::LOCK, lock(lock::SHARED, lock::BLOCK, 2));
    assert_eq!(send(&client.0, &wait), Err(Reply::Wait(5)));
    let flush = send(&client.0, &message(kind_of::FLUSH, out().u16(5)));
    assert!(matches!(flush, Err(Reply::Cancelled(5, _))));
    let test = out().u32(1).u8(lock::SHARED).u64(0).u64(0).u32(2).text(b"host");
    assert_eq!(client.ask(kind_of::GETLOCK, test).unwrap()[0], lock::EXCLUSIVE);
    assert_eq!(client.ask(kind_of::LOCK, lock(lock::UNLOCK, 0, 1)), Ok(vec![lock::SUCCESS]));
    assert_eq!(client.ask(kind_of::LOCK, lock(lock::SHARED, 0, 2)), Ok(vec![lock::SUCCESS]));
}

#[test]
fn a_read_only_folder_is_not_written() {
    let place = Place::new();
    std::fs::write(place.path("f"), "x").unwrap();
    let settings = Settings { read_only: true, ..SETTINGS };
    let client = Client::of(P9Server::new(place.share_with(settings)));
    assert_eq!(client.create(1, "g"), Err(Errno::ROFS));
    client.walk(0, 2, &["f"]).unwrap();
    assert_eq!(client.ask(kind_of::LOPEN, out().u32(2).u32(1)), Err(Errno::ROFS));
    assert_eq!(
        client.ask(kind_of::XATTRCREATE, out().u32(2).text(b"user.a").u64(1).u32(0)),
        Err(Errno::ROFS)
    );
    client.ask(kind_of::LOPEN, out().u32(2).u32(0)).unwrap();
}

#[test]
fn the_device_tells_its_tag() {
    let place = Place::new();
    let mut device = super::device(place.share(), "tag");
    let mut config = [1; 6];
    device.read_config(0, &mut config);
    assert_eq!(&config, b"\x03\0tag\0");
}

#[test]
fn whatever_a_guest_sends_is_answered_and_stays_in_the_folder() {
    let place = Place::new();
    let outside = place.outside("secret").to_string_lossy().into_owned();
    let names = ["a", "b", "c", "..", ".", "a/b", "", &outside, "link", "user.x", &"n".repeat(256)];
    const KINDS: [u8; 25] = [
        8, 12, 14, 16, 18, 20, 22, 24, 26, 30, 32, 40, 52, 54, 70, 72, 74, 76, 104, 108, 110, 116, 118, 120,
        122,
    ];
    let mut random = Random(0x5eed_0002);
    let client = Client::new(&place);
    let (end, mut count) = (Instant::now() + Duration::from_secs(2), 0u64);
    while Instant::now() < end {
        count += 1;
        let kind = if random.below(50) == 0 { random.next() as u8 } else { random.of(&KINDS) };
        if matches!(kind, kind_of::FSYNC | kind_of::VERSION) && count % 64 != 0 {
            continue;
        }
        let mut body = out().u32(random.below(12) as u32);
        for _ in 0..random.below(7) {
            body = match random.below(6) {
                0 => body.u64(random.next()),
                1 => body.u64(random.below(64)),
                2 | 3 => body.u32(random.below(12) as u32),
                4 => body.text(random.of(&names).as_bytes()),
                _ => body.u16(random.below(3) as u16),
            };
        }
        let mut request = message(kind, body);
        if random.below(8) == 0 {
            request.truncate(random.below(request.len() as u64 + 1) as usize);
        }
        if let Ok(answer) = send(&client.0, &request) {
            assert_eq!(Fields(&answer).u32().unwrap() as usize, answer.len());
        }
    }
    assert!(count > 2000, "{count}");
    assert!(descriptors_below(&place.path("")) <= 300);
    place.check_outside();
    client.0.reset();
    assert_eq!(descriptors_below(&place.path("")), 1, "a new session holds nothing");
}

#[test]
fn the_device_survives_random_drivers() {
    let place = Place::new();
    std::fs::write(place.path("a"), "file").unwrap();
    crate::fuzz::exercise(|| Box::new(super::device(place.share(), "tag")));
    place.check_outside();
    assert_eq!(descriptors_below(&place.path("")), 0, "nothing is left open");
}

#[test]
fn attributes_that_fids_hold_have_an_end() {
    let place = Place::new();
    let client = Client::new(&place);
    client.create(1, "f").unwrap();
    client.walk(0, 2, &["f"]).unwrap();
    // Room is taken when an attribute is begun, not when it is written.
    let begun = (100u32..)
        .take_while(|&fid| {
            client.walk(2, fid, &[]).unwrap();
            let body = out().u32(fid).text(b"user.a").u64(64 << 10).u32(0);
            client.ask(kind_of::XATTRCREATE, body).is_ok()
        })
        .count() as u32;
    assert!((100..256).contains(&begun), "{begun}");
    let another = out().u32(100 + begun).text(b"user.a").u64(64 << 10).u32(0);
    assert_eq!(client.ask(kind_of::XATTRCREATE, another), Err(Errno::NOMEM));
    assert_eq!(client.ask(kind_of::CLUNK, out().u32(100)), Err(Errno::INVAL), "it was not written");
    let another = out().u32(100 + begun).text(b"user.a").u64(64 << 10).u32(0);
    client.ask(kind_of::XATTRCREATE, another).unwrap();
    let long = "n".repeat(256);
    let named = out().u32(2).text(long.as_bytes()).u64(1).u32(0);
    assert_eq!(client.ask(kind_of::XATTRCREATE, named), Err(Errno::RANGE));
}

#[test]
fn changed_requests_of_linux_are_answered_and_stay_in_the_folder() {
    crate::share::fuzz::exercise(&crate::share::fuzz::Protocol {
        server: &|folder| Box::new(P9Server::new(folder)),
        corpus: include_str!("corpus.txt"),
        prelude: 2,
        mend: |request| {
            request.resize(request.len().max(HEADER), 0);
            let len = (request.len() as u32).to_le_bytes();
            request[..4].copy_from_slice(&len);
        },
        check: |request, answer| {
            assert_eq!(Fields(answer).u32().unwrap() as usize, answer.len());
            assert_eq!(answer[5..7], request[5..7], "the tag");
            assert!(answer[4] == request[4].wrapping_add(1) || answer[4] == kind_of::LERROR + 1);
        },
    });
}

#[test]
fn a_client_that_lies_about_fids_and_lengths_is_refused() {
    let place = Place::new();
    std::fs::create_dir_all(place.path("d/e")).unwrap();
    let client = Client::new(&place);
    client.create(1, "f").unwrap();
    let many: Vec<_> = (0..17).map(|_| "..").collect();
    assert_eq!(client.walk(0, 2, &many), Err(Errno::INVAL));
    assert_eq!(client.walk(0, 2, &many[..16]), Ok(16), "above the folder is the folder");
    assert_eq!(client.walk(0, 3, &["d", "e", "..", "..", "..", "f"]), Ok(6));
    assert_eq!(client.walk(0, 1, &["d"]), Err(Errno::BADF), "the fid is taken");
    assert_eq!(client.walk(99, 5, &[]), Err(Errno::BADF));
    assert_eq!(client.walk(1, 5, &["x"]), Err(Errno::NOTDIR), "a file has nothing below it");
    for name in ["../outside", "/", "d/e", ""] {
        assert!(client.walk(0, 5, &[name]).is_err(), "{name}");
    }
    // A count of names without the names.
    assert_eq!(client.ask(kind_of::WALK, out().u32(0).u32(5).u16(3).text(b"d")), Err(Errno::INVAL));
    assert_eq!(client.ask(kind_of::WALK, out().u32(0).u32(5).u16(1).u16(0xffff)), Err(Errno::INVAL));
    let attach = out().u32(0).u32(u32::MAX).text(b"").text(b"").u32(0);
    assert_eq!(client.ask(kind_of::ATTACH, attach), Err(Errno::BADF));
    let read = |fid, offset, count| client.ask(kind_of::READ, out().u32(fid).u64(offset).u32(count));
    assert_eq!(read(1, 0, u32::MAX).unwrap(), out().u32(0).0);
    assert!(read(1, u64::MAX, 10).is_err());
    assert_eq!(read(2, 0, 10), Err(Errno::BADF), "it is not open");
    assert_eq!(client.ask(kind_of::WRITE, out().u32(1).u64(0).u32(u32::MAX)), Err(Errno::MSGSIZE));
    let create = out().u32(3).text(b"user.a").u64(1 << 40).u32(0);
    assert_eq!(client.ask(kind_of::XATTRCREATE, create), Err(Errno::TOOBIG));
    assert_eq!(client.ask(kind_of::LOPEN, out().u32(1).u32(0)), Err(Errno::BADF), "it is open already");
    client.ask(kind_of::CLUNK, out().u32(1)).unwrap();
    assert_eq!(client.ask(kind_of::CLUNK, out().u32(1)), Err(Errno::BADF));
    place.check_outside();
}
