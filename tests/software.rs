//! Programs from Debian's packages, which nobody wrote for Ringside: they come into the guest with all that they need, and
//! compute there what they compute elsewhere.

mod common;

use std::time::Duration;

use common::guest::Random;
use common::{ringside, run_within, stderr};
use sha2::{Digest, Sha256};

/// Fetching the packages is in it.
const LIMIT: Duration = Duration::from_secs(900);

/// What a script prints in a guest with packages; its status must be 0.
fn printed(packages: &str, more: &[&str], script: &str) -> String {
    let mut command = ringside();
    command.args(["run", "--engine", "soft", "--package", packages]).args(more).args(["--exec", script]);
    let output = run_within(&mut command, LIMIT);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{text}{}", stderr(&output));
    text
}

#[test]
fn python_computes_long_numbers_doubles_and_hashes() {
    let script = r#"python3 - <<'END'
import hashlib, math, struct
print(pow(3, 2**127 - 2, 2**127 - 1))
print(2**521 % 10**20, math.isqrt(10**60), (-7) // 2, divmod(-2**70, 3**20))
print(repr(0.1 + 0.2), float('1e-320').hex(), math.fsum([0.1] * 10), struct.pack('>d', -0.0).hex())
print(hashlib.sha256(bytes(range(256)) * 40).hexdigest())
END"#;
    let lines: Vec<String> = printed("python3", &[], script).lines().map(str::to_owned).collect();
    // Fermat: 2^127 - 1 is a prime.
    assert_eq!(lines[0], "1");
    let power = (0..521).fold(1u128, |value, _| value * 2 % 10u128.pow(20));
    let (dividend, divisor) = (-(1i128 << 70), 3i128.pow(20));
    let quotient = (dividend.div_euclid(divisor), dividend.rem_euclid(divisor));
    assert_eq!(lines[1], format!("{power} 1{} -4 {quotient:?}", "0".repeat(30)));
    assert_eq!(lines[2], format!("{} 0x0.00000000007e8p-1022 1.0 8000000000000000", 0.1 + 0.2));
    let bytes: Vec<u8> = (0..=255).collect::<Vec<u8>>().repeat(40);
    let hash: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(lines[3], hash);
}

#[test]
fn openssl_and_xz_agree_with_the_host() {
    let mut random = Random::new(3);
    let text: String = (0..3000).map(|_| format!("{}\n", random.next() % 5000)).collect();
    let packed = liblzma::encode_all(text.as_bytes(), 6).unwrap();
    let hex: String = packed.iter().map(|byte| format!("{byte:02x}")).collect();
    // The vector is the first of FIPS 197's appendix C.
    let script = format!(
        "echo {hex} | xxd -r -p > /tmp/a.xz; xz -dc /tmp/a.xz > /tmp/a; openssl dgst -sha256 -r /tmp/a\n\
         xz -9 < /tmp/a | xz -dc | cmp - /tmp/a && echo same\n\
         echo 00112233445566778899aabbccddeeff | xxd -r -p | openssl enc -aes-128-ecb -nopad \
         -K 000102030405060708090a0b0c0d0e0f | xxd -p\n\
         readlink -f \"$(which awk)\"; awk 'BEGIN {{ printf \"%.3f\\n\", exp(1) }}'\n"
    );
    let output = printed("openssl,xz-utils,mawk", &[], &script);
    let hash: String = Sha256::digest(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
    let lines: Vec<_> = output.lines().collect();
    assert!(lines[0].starts_with(&hash), "{output}");
    // The last: a package's program stands before busybox's of the same name, by update-alternatives' link.
    assert_eq!(lines[1..], ["same", "69c4e0d86a7b0430d8cdb78070b4c55a", "/bin/mawk", "2.718"]);
}

/// stress-ng ends with a status other than 0 where one of its own checks fails.
fn stressed(more: &[&str], script: &str) {
    let output = printed("stress-ng", more, &format!("cd /tmp; {script} 2>&1"));
    assert!(output.contains("successful run completed") && !output.contains("fail:"), "{output}");
}

#[test]
fn what_stress_ng_computes_verifies_on_two_vcpus() {
    let script = "stress-ng --verify -t 12 --cpu 1 --vm 1 --vm-bytes 24M --vm-method all";
    stressed(&["--cpus", "2"], script);
}

/// Of the scheduler's class: threads and processes that are made, wake each other, wait for locks and move between vCPUs.
#[test]
fn what_stress_ng_schedules_on_two_vcpus_verifies() {
    let script = "stress-ng --verify -t 12 --affinity 1 --clone 1 --daemon 1 --fork 1 --futex 1 --mutex 1 --msg 1 \
                  --pthread 1 --sleep 1 --switch 1 --wait 1 --yield 1";
    stressed(&["--cpus", "2"], script);
    // These take a processor for themselves, and leave nothing to others.
    stressed(&["--cpus", "2"], "stress-ng --verify -t 4 --hrtimers 1");
    stressed(&["--cpus", "2"], "stress-ng --verify -t 4 --schedpolicy 1");
}

/// Of the classes of memory and virtual memory: pages mapped, moved, protected, shared and copied on a write.
#[test]
fn what_stress_ng_maps_on_two_vcpus_verifies() {
    let script = "stress-ng --verify -t 15 --bigheap 1 --bigheap-growth 64K --fault 1 --madvise 1 --malloc 1 --malloc-bytes 16M \
                  --memcpy 1 --mmap 1 --mmap-bytes 16M --mprotect 1 --mremap 1 --mremap-bytes 4M --shm 1 --shm-bytes 4M \
                  --stack 1 --userfaultfd 1 --userfaultfd-bytes 4M --vm-addr 1";
    stressed(&["--cpus", "2", "--memory", "1G"], script);
}

#[test]
fn what_stress_ng_computes_verifies_without_the_translator() {
    stressed(&["--jit", "off"], "stress-ng --verify -t 10 --cpu 1");
}

#[test]
fn a_package_that_there_is_not_ends_the_run_with_apts_sentence() {
    let mut command = ringside();
    let output = run_within(command.args(["run", "--package", "no-such-package", "--exec", "true"]), LIMIT);
    assert_eq!(output.status.code(), Some(240));
    assert!(stderr(&output).contains("Unable to locate package no-such-package"), "{}", stderr(&output));
}
