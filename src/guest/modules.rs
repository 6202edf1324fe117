//! Kernel modules: what each says of itself, and the order in which the wanted ones can be loaded.
//!
//! Dependencies, aliases and names are read from the `.modinfo` section of the modules themselves (`name=value`,
//! each closed by a zero byte), as depmod does; Debian's packages carry no `modules.dep`.

use std::collections::{BTreeMap, BTreeSet};

use object::{Object, ObjectSection};

use super::GuestError;

/// What the default guests want, where their kernel has it as a module.
pub const WANTED: &[&str] = &[
    "virtio_pci",
    "virtio_mmio",
    "virtio_net",
    "virtio_blk",
    "virtio_console",
    "virtio_balloon",
    "virtio_rng",
    "vmw_vsock_virtio_transport",
    "e1000",
    "9p",
    "9pnet_virtio",
    "virtiofs",
    "overlay",
    "ext4",
    "loop",
    "kvm",
    "kvm_intel",
    "tcp_bbr",
    "sch_netem",
    "nd_pmem",
    "virtio_pmem",
    "nfit",
];

/// What a module says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModuleInfo {
    /// Its name, with underscores.
    pub name: String,
    /// The modules that must be loaded before it.
    pub depends: Vec<String>,
    /// Names or aliases that it would like to be loaded before it.
    pub softdeps: Vec<String>,
    /// Patterns of the devices and services that it is for.
    pub aliases: Vec<String>,
}

/// A module's name as the kernel writes it.
pub fn normalized(name: &str) -> String {
    name.replace('-', "_")
}

/// The name of the module in a file: `kernel/fs/9p/9p.ko.xz` is `9p`.
pub fn name_of_path(path: &str) -> Option<String> {
    let file = path.rsplit('/').next()?;
    let (name, ending) = file.split_once(".ko")?;
    let known = matches!(ending, "" | ".xz" | ".zst" | ".gz");
    (known && !name.is_empty()).then(|| normalized(name))
}

/// Reads a module's `.modinfo`.
///
/// # Errors
/// [`GuestError::Module`] for what is not an ELF file with that section.
pub fn read_info(name: &str, elf: &[u8]) -> Result<ModuleInfo, GuestError> {
    let bad = |error: object::Error| GuestError::module(name, error);
    let file = object::File::parse(elf).map_err(bad)?;
    let section = file
        .section_by_name(".modinfo")
        .ok_or_else(|| GuestError::module(name, "it has no .modinfo section: it is no kernel module"))?;
    let mut info = ModuleInfo { name: normalized(name), ..ModuleInfo::default() };
    for entry in section.data().map_err(bad)?.split(|&byte| byte == 0) {
        let Ok(entry) = std::str::from_utf8(entry) else { continue };
        match entry.split_once('=') {
            Some(("depends", list)) => {
                info.depends.extend(list.split(',').filter(|name| !name.is_empty()).map(normalized));
            }
            Some(("alias", alias)) => info.aliases.push(alias.to_owned()),
            Some(("softdep", list)) => info.softdeps.extend(softdeps_before(list)),
            _ => {}
        }
    }
    Ok(info)
}

/// The names after `pre:` in `pre: a b post: c`.
fn softdeps_before(list: &str) -> impl Iterator<Item = String> {
    let mut before = false;
    list.split_whitespace().filter_map(move |word| match word {
        "pre:" | "post:" => {
            before = word == "pre:";
            None
        }
        _ => before.then(|| word.to_owned()),
    })
}

/// The modules to take, and those that are left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Names; each stands after everything that it depends on.
    pub order: Vec<String>,
    /// Wanted ones that the kernel has built in.
    pub builtin: Vec<String>,
    /// Wanted ones that the kernel does not have.
    pub missing: Vec<String>,
}

/// Orders the wanted modules and everything that they need.
///
/// # Errors
/// [`GuestError::Module`] where modules depend on each other in a circle, or on one that is nowhere.
pub fn plan(
    wanted: &[&str],
    modules: &BTreeMap<String, ModuleInfo>,
    builtin: &BTreeSet<String>,
) -> Result<Plan, GuestError> {
    let mut plan = Plan::default();
    let mut placed = BTreeSet::new();
    for &name in wanted {
        if builtin.contains(name) {
            plan.builtin.push(name.to_owned());
        } else if modules.contains_key(name) {
            place(name, modules, builtin, &mut placed, &mut plan.order)?;
        } else {
            plan.missing.push(name.to_owned());
        }
    }
    Ok(plan)
}

/// Depth first, with a stack of its own: appends `root` to `order` after all that it needs.
fn place(
    root: &str,
    modules: &BTreeMap<String, ModuleInfo>,
    builtin: &BTreeSet<String>,
    placed: &mut BTreeSet<String>,
    order: &mut Vec<String>,
) -> Result<(), GuestError> {
    // Each with the modules that it still waits for.
    let mut waiting: Vec<(String, Vec<String>)> = Vec::new();
    let mut next = Some(root.to_owned());
    loop {
        if let Some(name) = next.take().filter(|name| !placed.contains(name) && !builtin.contains(name)) {
            if waiting.iter().any(|(other, _)| *other == name) {
                return Err(GuestError::module(name, "it depends on itself through others"));
            }
            let needed_by = waiting.last().map_or(root, |(other, _)| other.as_str());
            let info = modules.get(&name).ok_or_else(|| {
                GuestError::module(needed_by, format!("it depends on {name}, which is nowhere"))
            })?;
            let mut needs = info.depends.clone();
            needs.extend(info.softdeps.iter().flat_map(|wish| providers(wish, &name, modules)));
            needs.reverse();
            waiting.push((name, needs));
        }
        let Some((name, needs)) = waiting.last_mut() else { return Ok(()) };
        next = needs.pop();
        if next.is_none() {
            placed.insert(name.clone());
            order.push(std::mem::take(name));
            waiting.pop();
        }
    }
}

/// The modules that a soft dependency means: by name, or all that have it as an alias.
fn providers(wish: &str, wisher: &str, modules: &BTreeMap<String, ModuleInfo>) -> Vec<String> {
    let by_name = normalized(wish);
    if modules.contains_key(&by_name) {
        return vec![by_name];
    }
    let offers = |info: &&ModuleInfo| info.name != wisher && info.aliases.iter().any(|alias| alias == wish);
    modules.values().filter(offers).map(|info| info.name.clone()).collect()
}

/// The names in the lines of `modules.builtin`: paths such as `kernel/fs/ext4/ext4.ko`.
pub fn builtin_names(list: &str) -> BTreeSet<String> {
    list.lines().filter_map(name_of_path).collect()
}

/// `modules.dep` as modprobe reads it: `path: direct and indirect dependencies`, those to load first at the end.
///
/// `order` has each module after all that it needs.
pub fn dep_file(order: &[(String, &ModuleInfo)]) -> String {
    let infos: BTreeMap<&str, &ModuleInfo> =
        order.iter().map(|(_, info)| (info.name.as_str(), *info)).collect();
    let mut text = String::new();
    for (path, info) in order {
        let mut needs: BTreeSet<&str> = BTreeSet::new();
        let mut open = vec![*info];
        while let Some(info) = open.pop() {
            let new = info.depends.iter().filter(|name| needs.insert(name.as_str()));
            open.extend(new.filter_map(|name| infos.get(name.as_str())));
        }
        text.push_str(path);
        text.push(':');
        for (path, _) in order.iter().rev().filter(|(_, other)| needs.contains(other.name.as_str())) {
            text.push(' ');
            text.push_str(path);
        }
        text.push('\n');
    }
    text
}

/// `modules.alias` as modprobe reads it: `alias PATTERN module`.
pub fn alias_file(order: &[(String, &ModuleInfo)]) -> String {
    let mut text = String::new();
    for (_, info) in order {
        for alias in info.aliases.iter().filter(|alias| !alias.contains(char::is_whitespace)) {
            text.push_str(&format!("alias {alias} {}\n", info.name));
        }
    }
    text
}

/// The device patterns of one bus as alternatives of a shell `case`, or `None` where no module has any.
///
/// An alias with a character that could end the pattern is left out.
pub fn shell_pattern(bus: &str, order: &[(String, &ModuleInfo)]) -> Option<String> {
    let harmless =
        |c: char| c.is_ascii_alphanumeric() || matches!(c, ':' | '*' | '_' | '-' | ',' | '.' | '?');
    let patterns: BTreeSet<&str> = order
        .iter()
        .flat_map(|(_, info)| &info.aliases)
        .filter(|alias| alias.split_once(':').is_some_and(|(before, _)| before.trim_end_matches('*') == bus))
        .filter(|alias| alias.chars().all(harmless))
        .map(String::as_str)
        .collect();
    (!patterns.is_empty()).then(|| patterns.into_iter().collect::<Vec<_>>().join("|"))
}

#[cfg(test)]
mod tests {
    use super::super::testing::module_of;
    use super::*;

    fn info(name: &str, depends: &[&str]) -> (String, ModuleInfo) {
        let depends = depends.iter().map(|&name| name.to_owned()).collect();
        (name.to_owned(), ModuleInfo { name: name.to_owned(), depends, ..ModuleInfo::default() })
    }

    #[test]
    fn a_module_tells_its_dependencies_aliases_and_soft_dependencies() {
        let elf = module_of(&[
            "license=GPL",
            "softdep=pre: crypto-crc32c other post: late",
            "alias=pci:v00001AF4d*sv*sd*bc*sc*i*",
            "depends=virtio-ring,virtio",
        ]);
        let info = read_info("virtio-pci", &elf).unwrap();
        assert_eq!(info.name, "virtio_pci");
        assert_eq!(info.depends, ["virtio_ring", "virtio"]);
        assert_eq!(info.softdeps, ["crypto-crc32c", "other"]);
        assert_eq!(info.aliases, ["pci:v00001AF4d*sv*sd*bc*sc*i*"]);
    }

    #[test]
    fn a_module_cut_anywhere_is_an_error_or_tells_less_but_never_panics() {
        let elf = module_of(&["depends=a,b", "alias=x"]);
        for len in 0..elf.len() {
            let _ = read_info("cut", &elf[..len]);
        }
        assert!(read_info("cut", &elf[..40]).is_err());
        assert!(read_info("text", b"depends=a").is_err());
    }

    #[test]
    fn each_module_stands_after_all_that_it_needs() {
        let modules = BTreeMap::from([
            info("virtio_net", &["virtio_ring", "net_failover"]),
            info("net_failover", &["failover"]),
            info("failover", &[]),
            info("virtio_ring", &["virtio"]),
            info("virtio", &[]),
        ]);
        let plan =
            plan(&["virtio_net", "ext4", "e1000"], &modules, &BTreeSet::from(["ext4".into()])).unwrap();
        assert_eq!(plan.order, ["virtio", "virtio_ring", "failover", "net_failover", "virtio_net"]);
        assert_eq!((plan.builtin, plan.missing), (vec!["ext4".to_owned()], vec!["e1000".to_owned()]));
    }

    #[test]
    fn a_soft_dependency_brings_every_module_with_that_alias_and_a_missing_one_harms_nothing() {
        let mut modules = BTreeMap::from([info("ext4", &[]), info("crc32c_generic", &[])]);
        modules.get_mut("ext4").unwrap().softdeps = vec!["crypto-crc32c".into(), "nothing".into()];
        modules.get_mut("crc32c_generic").unwrap().aliases = vec!["crypto-crc32c".into()];
        assert_eq!(plan(&["ext4"], &modules, &BTreeSet::new()).unwrap().order, ["crc32c_generic", "ext4"]);
    }

    #[test]
    fn a_circle_and_a_dependency_that_is_nowhere_are_errors() {
        let modules =
            BTreeMap::from([info("a", &["b"]), info("b", &["c"]), info("c", &["a"]), info("d", &["x"])]);
        let error = plan(&["a"], &modules, &BTreeSet::new()).unwrap_err().to_string();
        assert!(error.contains("depends on itself"), "{error}");
        let error = plan(&["d"], &modules, &BTreeSet::new()).unwrap_err().to_string();
        assert!(error.contains("x, which is nowhere"), "{error}");
        // Nor does a circle keep the writer of modules.dep in a loop.
        let order: Vec<_> = modules.values().map(|info| (format!("{}.ko", info.name), info)).collect();
        assert!(dep_file(&order).lines().count() == 4);
    }

    #[test]
    fn modprobes_files_name_paths_and_aliases() {
        let modules = BTreeMap::from([info("a", &["b", "c"]), info("b", &["c"]), info("c", &[])]);
        let mut order: Vec<_> =
            modules.values().rev().map(|info| (format!("kernel/{}.ko", info.name), info)).collect();
        let text = dep_file(&order);
        assert!(text.contains("kernel/a.ko: kernel/b.ko kernel/c.ko\n"), "{text}");
        assert!(text.contains("kernel/c.ko:\n"), "{text}");
        let device = ModuleInfo {
            name: "e1000".into(),
            aliases: vec!["pci:v00008086d00001000*".into(), "pci:v1'; reboot;".into(), "virtio:d1v*".into()],
            ..ModuleInfo::default()
        };
        order = vec![("kernel/e1000.ko".into(), &device)];
        assert!(alias_file(&order).starts_with("alias pci:v00008086d00001000* e1000\n"));
        assert_eq!(shell_pattern("pci", &order).as_deref(), Some("pci:v00008086d00001000*"));
        assert_eq!(shell_pattern("usb", &order), None);
    }

    #[test]
    fn names_come_from_paths() {
        assert_eq!(
            name_of_path("kernel/drivers/char/hw_random/virtio-rng.ko.xz").as_deref(),
            Some("virtio_rng")
        );
        assert_eq!(name_of_path("kernel/README"), None);
        assert!(builtin_names("kernel/fs/ext4/ext4.ko\n\n").contains("ext4"));
    }
}
