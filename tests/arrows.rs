//! The arrows between the crates point one way: what ARCHITECTURE.md draws is what Cargo is told.

use std::collections::{BTreeMap, BTreeSet};

/// Which of the project's crates each of them may depend on, directly.
const ALLOWED: &[(&str, &[&str])] = &[
    ("ringside-x86", &[]),
    ("ringside-guest-memory", &[]),
    ("ringside-exits", &["ringside-x86"]),
    ("ringside-engine", &["ringside-x86"]),
    ("ringside-kvm", &["ringside-x86", "ringside-engine", "ringside-exits", "ringside-guest-memory"]),
    ("ringside-emulator", &["ringside-x86", "ringside-engine", "ringside-exits", "ringside-guest-memory"]),
    ("ringside-devices", &["ringside-x86", "ringside-engine"]),
    ("ringside-disk", &[]),
    ("ringside-virtio", &["ringside-devices", "ringside-disk", "ringside-guest-memory"]),
    (
        "ringside-vmm",
        &[
            "ringside-x86",
            "ringside-engine",
            "ringside-exits",
            "ringside-guest-memory",
            "ringside-kvm",
            "ringside-emulator",
            "ringside-devices",
            "ringside-disk",
            "ringside-virtio",
        ],
    ),
    ("ringside", &["ringside-disk", "ringside-engine", "ringside-exits", "ringside-vmm"]),
    ("ringside-isa-fuzz", &["ringside-x86", "ringside-engine", "ringside-guest-memory", "ringside-emulator"]),
    ("xtask", &["ringside-isa-fuzz"]),
];

fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let metadata = cargo_metadata::MetadataCommand::new()
        .manifest_path(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))
        .no_deps()
        .exec()
        .expect("cargo metadata");
    let ours: BTreeSet<String> = metadata.packages.iter().map(|p| p.name.to_string()).collect();
    metadata
        .packages
        .iter()
        .map(|package| {
            let used = package
                .dependencies
                .iter()
                .filter(|d| d.kind == cargo_metadata::DependencyKind::Normal && ours.contains(&d.name))
                .map(|d| d.name.clone())
                .collect();
            (package.name.to_string(), used)
        })
        .collect()
}

#[test]
fn every_crate_depends_only_on_what_the_architecture_allows() {
    let allowed: BTreeMap<&str, &[&str]> = ALLOWED.iter().copied().collect();
    for (package, used) in dependencies() {
        let may =
            allowed.get(package.as_str()).unwrap_or_else(|| panic!("{package} is not in the architecture"));
        for dependency in used {
            assert!(may.contains(&dependency.as_str()), "{package} must not depend on {dependency}");
        }
    }
}

#[test]
fn every_crate_of_the_architecture_exists() {
    let present = dependencies();
    for (package, _) in ALLOWED {
        assert!(present.contains_key(*package), "{package} is gone: take it out of the architecture");
    }
}
