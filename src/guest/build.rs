//! From packages to what boots: the kernel, and an initramfs with its modules.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use super::deb::{self, PackagedFile, Walk};
use super::initramfs::{self, Contents, LoadedModule};
use super::modules::{self, ModuleInfo};
use super::{GuestError, Progress};

/// The largest kernel that is taken, in bytes.
const MAX_KERNEL: u64 = 256 << 20;
/// The largest module, in bytes; the generic kernel's has 8 MiB.
const MAX_MODULE: u64 = 64 << 20;
/// All modules that go into the initramfs, in bytes.
const MAX_MODULES: usize = 256 << 20;
/// The largest busybox, in bytes.
const MAX_BUSYBOX: u64 = 16 << 20;
/// The longest list of built-in modules, in bytes.
const MAX_LIST: u64 = 4 << 20;
/// The most modules that a kernel has.
const MAX_COUNT: usize = 50_000;

/// What was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Built {
    /// The kernel's release, as `uname -r` gives it.
    pub release: String,
    /// Modules in the initramfs, in an order in which they can be loaded.
    pub modules: Vec<String>,
    /// Wanted modules that the kernel has built in.
    pub builtin: Vec<String>,
    /// Wanted modules that the kernel does not have.
    pub missing: Vec<String>,
}

/// What the kernel's package gives.
#[derive(Default)]
struct Kernel {
    release: String,
    image: Vec<u8>,
    builtin: BTreeSet<String>,
    /// By name: what it says of itself, and its path in the package.
    index: BTreeMap<String, (ModuleInfo, String)>,
    /// Modules that are kept because they are wanted, by name.
    kept: BTreeMap<String, Vec<u8>>,
}

impl Kernel {
    /// Takes a module out, for the initramfs.
    fn take(&mut self, name: &str) -> Result<LoadedModule, GuestError> {
        let found = self.index.get(name).zip(self.kept.remove(name)).and_then(|((info, path), data)| {
            let path = path.strip_prefix(&format!("lib/modules/{}/", self.release))?;
            let path = path.split_once(".ko").map_or(path.to_owned(), |(name, _)| format!("{name}.ko"));
            Some(LoadedModule { path, info: info.clone(), data })
        });
        found.ok_or_else(|| {
            GuestError::module(name, format!("it is not below lib/modules/{} in the package", self.release))
        })
    }
}

/// Makes `vmlinuz` and `initramfs.cpio` in `folder` from the two packages.
///
/// # Errors
/// [`GuestError`] for packages that are broken or lack what is needed, and where the folder cannot be written.
pub fn build(
    kernel_deb: &Path,
    busybox_deb: &Path,
    folder: &Path,
    progress: &mut dyn Progress,
) -> Result<Built, GuestError> {
    let busybox = read_busybox(busybox_deb)?;
    let bytes = fs::metadata(kernel_deb).map(|meta| meta.len()).ok();
    progress.begin("Unpacking the kernel and its modules", bytes);
    let kernel = read_kernel(kernel_deb, progress);
    progress.end();
    let mut kernel = kernel?;
    let infos = kernel.index.iter().map(|(name, (info, _))| (name.clone(), info.clone())).collect();
    let plan = modules::plan(modules::WANTED, &infos, &kernel.builtin)?;
    keep_missing(kernel_deb, &plan.order, &mut kernel, progress)?;
    let loaded = plan.order.iter().map(|name| kernel.take(name)).collect::<Result<Vec<_>, _>>()?;
    write_file(&folder.join("vmlinuz"), |out| out.write_all(&kernel.image))?;
    let contents = Contents { kernel_version: &kernel.release, busybox: &busybox, modules: &loaded };
    let mut result = Ok(());
    write_file(&folder.join("initramfs.cpio"), |out| {
        result = initramfs::base(&contents, out);
        out.write_all(&initramfs::system())
    })?;
    result?;
    Ok(Built { release: kernel.release, modules: plan.order, builtin: plan.builtin, missing: plan.missing })
}

/// Creates a file that is on the disk when this returns.
pub(super) fn write_file(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> Result<(), GuestError> {
    let written = File::create(path).and_then(|file| {
        let mut out = BufWriter::with_capacity(1 << 20, file);
        write(&mut out)?;
        out.into_inner().map_err(|error| error.into_error())?.sync_all()
    });
    written.map_err(GuestError::file("write", path))
}

fn read_busybox(deb: &Path) -> Result<Vec<u8>, GuestError> {
    let mut busybox = Vec::new();
    deb::for_each_file(deb, |file| {
        if file.path != "bin/busybox" {
            return Ok(Walk::On);
        }
        file.read(&mut busybox, MAX_BUSYBOX)?;
        Ok(Walk::Stop)
    })?;
    if busybox.starts_with(b"\x7fELF") {
        return Ok(busybox);
    }
    Err(GuestError::package(
        deb.file_name().unwrap_or_default().to_string_lossy(),
        "it has no busybox program",
    ))
}

/// Reads the kernel, describes all its modules, and keeps those that are wanted or already known to be needed.
fn read_kernel(deb: &Path, progress: &mut dyn Progress) -> Result<Kernel, GuestError> {
    let name = deb.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut kernel = Kernel::default();
    let mut needed: BTreeSet<String> = modules::WANTED.iter().map(|&name| name.to_owned()).collect();
    let mut failure = None;
    let mut data = Vec::new();
    deb::for_each_file(deb, |file| {
        progress.advance(file.consumed);
        if let Some(release) = file.path.strip_prefix("boot/vmlinuz-") {
            kernel.release = release.to_owned();
            file.read(&mut kernel.image, MAX_KERNEL)?;
        } else if file.path.starts_with("lib/modules/") && file.path.ends_with("/modules.builtin") {
            file.read(&mut data, MAX_LIST)?;
            kernel.builtin = modules::builtin_names(&String::from_utf8_lossy(&data));
        } else if let Some(module) = module_name(file) {
            data = read_module(file, std::mem::take(&mut data))?;
            match modules::read_info(&module, &data) {
                Ok(info) if needed.contains(&module) => {
                    needed.extend(info.depends.iter().cloned());
                    kernel.index.insert(module.clone(), (info, file.path.to_owned()));
                    kernel.kept.insert(module, std::mem::take(&mut data));
                }
                Ok(info) => drop(kernel.index.insert(module, (info, file.path.to_owned()))),
                Err(error) => failure = Some(error),
            }
            let kept: usize = kernel.kept.values().map(Vec::len).sum();
            if kernel.index.len() > MAX_COUNT || kept > MAX_MODULES {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "it has too many modules"));
            }
        }
        Ok(if failure.is_some() { Walk::Stop } else { Walk::On })
    })?;
    match failure {
        Some(error) => Err(error),
        None if kernel.image.is_empty() => {
            Err(GuestError::package(name, "it has no kernel (boot/vmlinuz-*)"))
        }
        None => Ok(kernel),
    }
}

/// Reads what turned out to be needed only after it had gone by.
fn keep_missing(
    deb: &Path,
    order: &[String],
    kernel: &mut Kernel,
    progress: &mut dyn Progress,
) -> Result<(), GuestError> {
    let is_kept = |name: &String| kernel.kept.contains_key(name);
    let mut missing: BTreeSet<String> = order.iter().filter(|name| !is_kept(name)).cloned().collect();
    if missing.is_empty() {
        return Ok(());
    }
    progress.begin("Unpacking what these modules need", fs::metadata(deb).map(|meta| meta.len()).ok());
    let result = deb::for_each_file(deb, |file| {
        progress.advance(file.consumed);
        if let Some(module) = module_name(file).filter(|name| missing.remove(name)) {
            let data = read_module(file, Vec::new())?;
            kernel.kept.insert(module, data);
        }
        Ok(if missing.is_empty() { Walk::Stop } else { Walk::On })
    });
    progress.end();
    result
}

fn module_name(file: &PackagedFile<'_>) -> Option<String> {
    let below = file.path.strip_prefix("lib/modules/")?;
    modules::name_of_path(below)
}

fn read_module(file: &mut PackagedFile<'_>, mut buffer: Vec<u8>) -> io::Result<Vec<u8>> {
    file.read(&mut buffer, MAX_MODULE)?;
    deb::unpack_module(file.path, buffer, MAX_MODULE)
}
