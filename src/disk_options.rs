//! What the command line says of disks: `--disk`, and the options of `ringside disk`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use disk::{Cache, Format};
use vmm::config::{DiskConfig, Limits, PMEM_UNIT, PmemConfig};

use crate::size;

/// What can be done with disk images.
#[derive(Debug, Subcommand)]
pub enum DiskCommand {
    /// Create an empty image
    ///
    /// It takes up next to nothing until it is written, unless --preallocate is given.
    Create(CreateArgs),
    /// Tell what an image is, and what it takes up
    ///
    /// The image may be in use.
    Info {
        /// The image
        file: PathBuf,
        /// Its format; found out where it is not told
        #[arg(long, value_name = "raw|qcow2", value_parser = format)]
        format: Option<Format>,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Copy an image's disk into a new image, perhaps of another format
    ///
    /// Backing files become part of the new image. Zeros take up no space in it.
    Convert(ConvertArgs),
    /// Make an image's disk larger or smaller
    ///
    /// What is new at its end is zeros. Partitions and file systems stay as they are.
    Resize {
        /// The image
        file: PathBuf,
        /// Its new size: 20G; or +4G, -4G to change it by so much
        #[arg(value_name = "SIZE", value_parser = change, allow_hyphen_values = true)]
        size: Change,
        /// Its format; found out where it is not told
        #[arg(long, value_name = "raw|qcow2", value_parser = format)]
        format: Option<Format>,
        /// Allow what lies behind the new end to be lost
        #[arg(long)]
        shrink: bool,
    },
    /// Look for errors in a qcow2 image's tables, and for space that is lost in it
    ///
    /// The exit status is 0 where there is nothing wrong, 2 where there are errors and 3 where space is lost and nothing
    /// else, each of them after the repair where there is one.
    Check {
        /// The image
        file: PathBuf,
        /// Make the refcounts right; it has to be in use by nobody
        #[arg(long)]
        repair: bool,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
}

/// The options of `ringside disk create`.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// The new image
    pub file: PathBuf,
    /// The disk's size: 20G; that of the backing file where there is one
    #[arg(value_name = "SIZE", value_parser = size::parse, required_unless_present = "backing")]
    pub size: Option<u64>,
    /// Its format [default: qcow2 for a name that ends with .qcow2, else raw]
    #[arg(long, value_name = "raw|qcow2", value_parser = format)]
    pub format: Option<Format>,
    /// Show what this image has where nothing is written; it must not change any more
    ///
    /// A relative name is relative to the new image's folder.
    #[arg(long, value_name = "FILE")]
    pub backing: Option<PathBuf>,
    /// The backing file's format; found out where it is not told
    #[arg(long, value_name = "raw|qcow2", value_parser = format, requires = "backing")]
    pub backing_format: Option<Format>,
    /// Bytes that qcow2 allocates at a time: a power of two from 512 to 2M [default: 64K]
    #[arg(long, value_name = "SIZE", value_parser = cluster_size)]
    pub cluster_size: Option<u64>,
    /// Take up all of the space now
    #[arg(long, conflicts_with = "backing")]
    pub preallocate: bool,
    /// Replace an image that is there already
    #[arg(long)]
    pub force: bool,
}

/// The options of `ringside disk convert`.
#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// The image to read
    pub from: PathBuf,
    /// The new image
    pub to: PathBuf,
    /// The new image's format [default: qcow2 for a name that ends with .qcow2, else raw]
    #[arg(long, value_name = "raw|qcow2", value_parser = format)]
    pub format: Option<Format>,
    /// The format of the image to read; found out where it is not told
    #[arg(long, value_name = "raw|qcow2", value_parser = format)]
    pub from_format: Option<Format>,
    /// Bytes that qcow2 allocates at a time: a power of two from 512 to 2M [default: 64K]
    #[arg(long, value_name = "SIZE", value_parser = cluster_size)]
    pub cluster_size: Option<u64>,
    /// Replace an image that is there already
    #[arg(long)]
    pub force: bool,
}

/// A new size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Of so many bytes.
    To(u64),
    /// Larger by so many.
    Grow(u64),
    /// Smaller by so many.
    Shrink(u64),
}

fn change(text: &str) -> Result<Change, String> {
    Ok(match (text.strip_prefix('+'), text.strip_prefix('-')) {
        (Some(more), _) => Change::Grow(size::parse(more)?),
        (_, Some(less)) => Change::Shrink(size::parse(less)?),
        _ => Change::To(size::parse(text)?),
    })
}

/// A format by its name.
///
/// # Errors
/// A message for the user.
pub fn format(text: &str) -> Result<Format, String> {
    Format::from_name(text).ok_or_else(|| "it is raw or qcow2".into())
}

fn cluster_size(text: &str) -> Result<u64, String> {
    let bytes = size::parse(text)?;
    match bytes.is_power_of_two() && (512..=2 << 20).contains(&bytes) {
        true => Ok(bytes),
        false => Err("it is a power of two from 512 to 2M".into()),
    }
}

/// Splits at commas; two of them are one that does not split.
fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(last) = parts.last_mut() {
            last.push(c);
        }
    }
    parts
}

/// Reads the value of `--disk`.
pub fn disk(text: &str) -> Result<DiskConfig, String> {
    let mut image = disk::Options::new("");
    let (mut serial, mut limits) = (String::new(), Limits::default());
    for (index, option) in split(text).iter().enumerate() {
        match option.split_once('=') {
            Some(("path", path)) => image.path = path.into(),
            Some(("format", name)) => {
                image.format = Some(
                    Format::from_name(name)
                        .ok_or_else(|| format!("the format {name:?} is not known: raw and qcow2 are"))?,
                );
            }
            Some(("readonly", value)) => image.read_only = switch("readonly", value)?,
            Some(("snapshot", value)) => image.snapshot = switch("snapshot", value)?,
            Some(("serial", value)) if value.len() <= 20 => serial = value.into(),
            Some(("serial", _)) => return Err("a serial number has at most 20 bytes".into()),
            Some(("cache", "writeback")) => image.cache = Cache::Writeback,
            Some(("cache", "direct")) => image.cache = Cache::Direct,
            Some(("cache", _)) => return Err("cache is writeback or direct".into()),
            Some(("iops", value)) => limits.iops = Some(rate("iops", value)?),
            Some(("bps", value)) => limits.bps = Some(rate("bps", value)?),
            _ if index == 0 => image.path = option.into(),
            _ => {
                return Err(format!(
                    "{option:?} is no option of a disk: format=, readonly=, snapshot=, serial=, cache=, \
                     iops=, bps="
                ));
            }
        }
    }
    if image.path.as_os_str().is_empty() {
        return Err("a disk needs a file: path=FILE".into());
    }
    if image.read_only && image.snapshot {
        return Err("a disk that is read-only needs no snapshot".into());
    }
    Ok(DiskConfig { image, serial, limits })
}

/// Reads the value of `--pmem`.
pub fn pmem(text: &str) -> Result<PmemConfig, String> {
    let mut pmem = PmemConfig::default();
    for (index, option) in split(text).iter().enumerate() {
        match option.split_once('=') {
            Some(("path", path)) => pmem.path = path.into(),
            Some(("size", size)) => pmem.size = Some(pmem_size(size)?),
            Some(("readonly", value)) => pmem.read_only = switch("readonly", value)?,
            Some(("snapshot", value)) => pmem.snapshot = switch("snapshot", value)?,
            _ if index == 0 => pmem.path = option.into(),
            _ => {
                return Err(format!(
                    "{option:?} is no option of persistent memory: size=, readonly=, snapshot="
                ));
            }
        }
    }
    if pmem.path.as_os_str().is_empty() {
        return Err("persistent memory needs a file: path=FILE".into());
    }
    if pmem.read_only && pmem.snapshot {
        return Err("persistent memory that is read-only needs no snapshot".into());
    }
    if pmem.size.is_some() && (pmem.read_only || pmem.snapshot) {
        return Err("size= is for a file that is written: leave readonly= and snapshot= out".into());
    }
    Ok(pmem)
}

fn pmem_size(text: &str) -> Result<u64, String> {
    match size::parse(text)? {
        0 => Err("persistent memory has at least 2M".into()),
        bytes if bytes % PMEM_UNIT != 0 => Err("persistent memory has a multiple of 2M".into()),
        bytes => Ok(bytes),
    }
}

/// Something a second.
fn rate(name: &str, value: &str) -> Result<u64, String> {
    match size::parse(value)? {
        0 => Err(format!("{name}=0 lets nothing happen: leave it out for no limit")),
        rate => Ok(rate),
    }
}

fn switch(name: &str, value: &str) -> Result<bool, String> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("{name} is on or off")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_have_a_file_and_options() {
        let plain = |path: &str| DiskConfig {
            image: disk::Options::new(path),
            serial: String::new(),
            limits: Limits::default(),
        };
        assert_eq!(disk("a.img"), Ok(plain("a.img")));
        assert_eq!(disk("path=a=b.img"), Ok(plain("a=b.img")));
        assert_eq!(disk("a,,b,format=raw").unwrap().image.path, PathBuf::from("a,b"));
        let all = disk("path=b,format=qcow2,snapshot=on,serial=S1,cache=direct").unwrap();
        let image = disk::Options {
            format: Some(Format::Qcow2),
            snapshot: true,
            cache: Cache::Direct,
            ..disk::Options::new("b")
        };
        assert_eq!(all, DiskConfig { image, serial: "S1".into(), limits: Limits::default() });
        let limits = disk("b,iops=1000,bps=1M").unwrap().limits;
        assert_eq!(limits, Limits { iops: Some(1000), bps: Some(1 << 20) });
        assert!(disk("b,readonly=on").unwrap().image.read_only);
    }

    #[test]
    fn persistent_memory_has_a_file_and_options() {
        let plain = PmemConfig { path: "a,b".into(), ..PmemConfig::default() };
        assert_eq!(pmem("a,,b"), Ok(plain.clone()));
        assert_eq!(pmem("path=a,,b,size=4M").unwrap(), PmemConfig { size: Some(4 << 20), ..plain.clone() });
        assert_eq!(pmem("a,,b,readonly=on").unwrap(), PmemConfig { read_only: true, ..plain.clone() });
        assert_eq!(pmem("a,,b,snapshot=on").unwrap(), PmemConfig { snapshot: true, ..plain });
        for (bad, why) in [
            ("", "path=FILE"),
            ("size=4M", "path=FILE"),
            ("a,size=3M", "multiple of 2M"),
            ("a,size=0", "at least 2M"),
            ("a,readonly=1", "on or off"),
            ("a,format=raw", "format=raw"),
            ("a,readonly=on,snapshot=on", "no snapshot"),
            ("a,size=2M,readonly=on", "leave readonly="),
        ] {
            let refused = pmem(bad).unwrap_err();
            assert!(refused.contains(why), "{bad}: {refused}");
        }
    }

    #[test]
    fn what_is_no_option_is_named() {
        for (bad, why) in [
            ("", "path=FILE"),
            ("readonly=on", "path=FILE"),
            ("a,b", "no option of a disk"),
            ("a,frob=1", "frob"),
            ("path=a,readonly=maybe", "on or off"),
            ("path=a,snapshot=1", "on or off"),
            ("path=a,snapshot=on,readonly=on", "no snapshot"),
            ("path=a,cache=none", "writeback or direct"),
            ("path=a,iops=0", "iops=0"),
            ("path=a,bps=fast", "not a size"),
            ("path=a,format=vmdk", "vmdk"),
            ("path=a,serial=123456789012345678901", "20 bytes"),
        ] {
            let refused = disk(bad).unwrap_err();
            assert!(refused.contains(why), "{bad}: {refused}");
        }
    }

    #[test]
    fn sizes_are_new_ones_or_changes() {
        assert_eq!(change("4K"), Ok(Change::To(4096)));
        assert_eq!(change("+1M"), Ok(Change::Grow(1 << 20)));
        assert_eq!(change("-1M"), Ok(Change::Shrink(1 << 20)));
        assert!(change("+").is_err() && change("x").is_err());
        assert!(cluster_size("3K").is_err() && cluster_size("4M").is_err() && cluster_size("256").is_err());
    }
}
