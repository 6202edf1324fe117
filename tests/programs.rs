//! Programs inside Debian give the results that the host's give. All of them run in one boot.

mod common;

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::{Read, Write};
use std::sync::OnceLock;
use std::time::Duration;

use common::guest::Random;
use common::{ringside, run_within, stderr};
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use sha2::{Digest, Sha256, Sha512};

const LIMIT: Duration = Duration::from_secs(300);

/// Parts of the script, and the names of what they print.
const PARTS: &[(&str, &str)] = &[
    (
        "arithmetic",
        "echo $((9223372036854775807 + 1)) $((-7 / 2)) $((-7 % 3)) $((1 << 63)) $((-1 >> 1)) $((0xffffffff * 0xffffffff))",
    ),
    (
        "loop",
        "a=1; i=0; while [ $i -lt 4000 ]; do a=$((a * 6364136223846793005 + 1442695040888963407)); i=$((i + 1)); done; echo $a",
    ),
    (
        "awk",
        "awk 'BEGIN { for (i = 1; i <= 3000; i++) { x = 1; for (k = 0; k < 5; k++) x = (x + i / x) / 2; s += x; p += 4 * (i % 2 ? 1 : -1) / (2 * i - 1); h = (h * 31 + i) % 1000003 } printf \"%.12f %.15f %d %.17g %e\\n\", s, p, h, 0.1 + 0.2, 1 / 3 }'",
    ),
    ("bc", "echo '2^200; scale=50; 1/7; sqrt(2)' | bc"),
    ("dc", "echo '3 200 ^ p' | dc"),
    ("factor", "factor 600851475143 4294967297"),
    (
        "sort",
        "sort -n /tmp/numbers | md5sum; sort /tmp/numbers | tail -n 1; sort -rn /tmp/numbers | head -n 1; sort -u /tmp/numbers | wc -l",
    ),
    ("sha256", "sha256sum < /tmp/numbers; cat /tmp/numbers /tmp/numbers | sha512sum"),
    ("md5", "printf '' | md5sum; printf 'message digest' | md5sum; sha1sum /dev/null"),
    ("gunzip", "gunzip < /tmp/packed.gz | sha256sum"),
    ("gzip", "gzip -c < /tmp/numbers | base64"),
    ("bzip2", "bzip2 < /tmp/numbers | bunzip2 | cmp - /tmp/numbers && echo same"),
    (
        "copy",
        "head -c 5000000 /dev/urandom > /tmp/a; cp /tmp/a /tmp/b; cmp /tmp/a /tmp/b && echo same; [ \"$(sha256sum < /tmp/a)\" = \"$(sha256sum < /tmp/b)\" ] && echo equal; rm /tmp/a /tmp/b",
    ),
    ("text", "seq 1 300 | sed 's/7/seven/g' | tr a-z A-Z | grep -c SEVEN; seq 1 100 | paste -s -d + - | bc"),
    (
        "processes",
        "n=0; for i in $(seq 1 20); do n=$((n + $( (exit $i); echo $?))); done; echo $n; seq 1 20 | xargs -P 4 -n 1 sh -c 'exit 0' && echo all",
    ),
    (
        "signals",
        "sh -c 'kill -SEGV $$' 2>/dev/null; echo $?; sh -c 'trap \"echo caught\" USR1; kill -USR1 $$'; timeout 1 sleep 10; echo $?",
    ),
];

/// What each part printed.
fn printed(part: &str) -> &'static str {
    static OUTPUT: OnceLock<HashMap<String, String>> = OnceLock::new();
    let all = OUTPUT.get_or_init(|| {
        let mut script = format!("{}{}", here_document("numbers", &numbers()), packed_numbers());
        for (name, commands) in PARTS {
            let _ = writeln!(script, "echo; echo '== {name}'; {commands}");
        }
        let mut command = ringside();
        let output = run_within(command.args(["run", "--engine", "soft", "--exec", &script]), LIMIT);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        let text = String::from_utf8(output.stdout).expect("text");
        let parts = text.split("\n== ").skip(1).filter_map(|part| part.split_once('\n'));
        parts.map(|(name, rest)| (name.to_owned(), rest.trim_end().to_owned())).collect()
    });
    all.get(part).unwrap_or_else(|| panic!("no {part} in {all:?}"))
}

/// Numbers in no order, some of them twice.
fn numbers() -> String {
    let mut random = Random::new(11);
    (0..4000).map(|_| format!("{}\n", random.next() % 100_000)).collect()
}

fn here_document(name: &str, text: &str) -> String {
    format!("cat > /tmp/{name} <<'END'\n{text}END\n")
}

/// The numbers, packed here.
fn packed_numbers() -> String {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(numbers().as_bytes()).unwrap();
    let octal: String = encoder.finish().unwrap().iter().map(|byte| format!("{byte:02x}")).collect();
    here_document("packed.hex", &format!("{octal}\n")) + "xxd -r -p < /tmp/packed.hex > /tmp/packed.gz\n"
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn shell_arithmetic_wraps_at_64_bits() {
    let product = 0xffff_ffffi64.wrapping_mul(0xffff_ffff);
    assert_eq!(printed("arithmetic"), format!("{} -3 -1 {} -1 {product}", i64::MIN, i64::MIN));
    let last = (0..4000)
        .fold(1i64, |a, _| a.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407));
    assert_eq!(printed("loop"), last.to_string());
}

#[test]
fn awk_computes_with_the_hosts_floating_point() {
    // Square roots by Newton's method, and the Leibniz series.
    let (mut roots, mut pi, mut hash) = (0.0f64, 0.0f64, 0u64);
    for i in 1..=3000u64 {
        let n = i as f64;
        roots += (0..5).fold(1.0, |x, _| (x + n / x) / 2.0);
        pi += 4.0 * (if i % 2 == 1 { 1.0 } else { -1.0 }) / (2.0 * n - 1.0);
        hash = (hash * 31 + i) % 1_000_003;
    }
    let expected = format!("{roots:.12} {pi:.15} {hash} 0.30000000000000004 3.333333e-01");
    assert_eq!(printed("awk"), expected);
}

#[test]
fn bc_and_dc_compute_with_long_numbers() {
    let lines: Vec<_> = printed("bc").lines().collect();
    assert_eq!(
        lines,
        [
            "1606938044258990275541962092341162602522202993782792835301376",
            ".14285714285714285714285714285714285714285714285714",
            "1.41421356237309504880168872420969807856967187537694",
        ]
    );
    let power =
        "265613988875874769338781322035779626829233452653394495974574961739092490901302182994384699044001";
    assert_eq!(printed("dc").replace("\\\n", ""), power);
    assert_eq!(printed("factor"), "600851475143: 71 839 1471 6857\n4294967297: 641 6700417");
}

#[test]
fn sort_gives_the_order_that_it_has_to_give() {
    let text = numbers();
    let mut values: Vec<u64> = text.lines().map(|line| line.parse().unwrap()).collect();
    let mut words: Vec<_> = text.lines().collect();
    values.sort_unstable();
    words.sort_unstable();
    let (greatest, last) = (values.last().unwrap().to_string(), *words.last().unwrap());
    words.dedup();
    let lines: Vec<_> = printed("sort").lines().skip(1).map(str::trim).collect();
    assert_eq!(lines, [last, &greatest, &words.len().to_string()]);
}

#[test]
fn digests_are_the_hosts() {
    let text = numbers();
    let digests: Vec<_> = printed("sha256").lines().map(|line| line.split(' ').next().unwrap()).collect();
    assert_eq!(digests, [hex(&Sha256::digest(&text)), hex(&Sha512::digest(text.repeat(2)))]);
    let digests: Vec<_> = printed("md5").lines().map(|line| line.split(' ').next().unwrap()).collect();
    // RFC 1321, *Test suite*; FIPS 180-4 of no bytes.
    assert_eq!(
        digests,
        [
            "d41d8cd98f00b204e9800998ecf8427e",
            "f96b697d7cb7938d525a2f31aaf161d0",
            "da39a3ee5e6b4b0d3255bfef95601890afd80709",
        ]
    );
}

#[test]
fn what_the_host_packs_the_guest_unpacks_and_the_other_way_round() {
    let digest = printed("gunzip").split(' ').next().unwrap();
    assert_eq!(digest, hex(&Sha256::digest(numbers())));
    let packed = base64(printed("gzip"));
    let mut text = String::new();
    GzDecoder::new(packed.as_slice()).read_to_string(&mut text).unwrap();
    assert!(text == numbers());
    assert_eq!(printed("bzip2"), "same");
}

/// Decodes what base64(1) prints. RFC 4648, *Base 64 Encoding*.
fn base64(text: &str) -> Vec<u8> {
    let value = |byte: u8| match byte {
        b'A'..=b'Z' => Some(byte - b'A'),
        b'a'..=b'z' => Some(byte - b'a' + 26),
        b'0'..=b'9' => Some(byte - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let values: Vec<u8> = text.bytes().filter_map(value).collect();
    let decode = |four: &[u8]| {
        let word = four.iter().fold(0, |word, &value| word << 6 | u32::from(value)) << (6 * (4 - four.len()));
        word.to_be_bytes()[1..four.len()].to_vec()
    };
    values.chunks(4).flat_map(decode).collect()
}

#[test]
fn five_megabytes_are_the_same_after_a_copy() {
    assert_eq!(printed("copy"), "same\nequal");
}

#[test]
fn pipes_processes_and_signals_work() {
    let sevens = (1..=300).filter(|number: &u32| number.to_string().contains('7')).count();
    assert_eq!(printed("text"), format!("{sevens}\n5050"));
    assert_eq!(printed("processes"), format!("{}\nall", (1..=20).sum::<u32>()));
    assert_eq!(printed("signals"), "139\ncaught\n143");
}
