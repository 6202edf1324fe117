//! `ringside disk`: disk images.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

use anyhow::Context;
use disk::{Conversion, Creation, Format, Info, Layer, Name, Options, qcow2};
use ringside::guest;
use serde_json::json;

use crate::disk_options::{Change, ConvertArgs, CreateArgs, DiskCommand};
use crate::size;

/// Exit statuses of a check: those that `qemu-img check` has.
const ERRORS: u8 = 2;
const LEAKS: u8 = 3;

/// Does what the command says; gives the exit status.
///
/// # Errors
/// What keeps it from being done.
pub fn run(command: &DiskCommand) -> anyhow::Result<u8> {
    match command {
        DiskCommand::Create(args) => create(args)?,
        DiskCommand::Info { file, format, json } => {
            let info = disk::info(file, *format)?;
            print(&if *json { info_json(&info) } else { info_text(&info) })?;
        }
        DiskCommand::Convert(args) => convert(args)?,
        DiskCommand::Resize { file, size, format, shrink } => resize(file, *size, *format, *shrink)?,
        DiskCommand::Check { file, repair, json } => return check(file, *repair, *json),
    }
    Ok(0)
}

fn create(args: &CreateArgs) -> anyhow::Result<()> {
    let size = disk::create(&Creation {
        path: args.file.clone(),
        format: args.format.unwrap_or_else(|| match args.backing {
            Some(_) => Format::Qcow2,
            None => Format::of_name(&args.file),
        }),
        size: args.size,
        backing: args.backing.clone().map(|path| (path, args.backing_format)),
        cluster_size: args.cluster_size,
        preallocate: args.preallocate,
        replace: args.force,
    })?;
    eprintln!("{}: a disk of {}", Name(&args.file), size::display(size));
    Ok(())
}

fn convert(args: &ConvertArgs) -> anyhow::Result<()> {
    let from = Options { format: args.from_format, ..Options::reading(&args.from) };
    let to = Creation {
        cluster_size: args.cluster_size,
        replace: args.force,
        ..Creation::new(&args.to, args.format.unwrap_or_else(|| Format::of_name(&args.to)), 0)
    };
    let size = disk::info(&args.from, args.from_format)?.layers[0].size;
    let mut progress = guest::to_stderr();
    progress.begin(&format!("converting {}", Name(&args.from)), Some(size));
    let done = disk::convert(&Conversion { from, to }, &mut |bytes| progress.advance(bytes));
    progress.end();
    let (size, written) = done?;
    eprintln!(
        "{}: a disk of {}, {} of them not zero",
        Name(&args.to),
        size::display(size),
        size::display(written)
    );
    Ok(())
}

fn resize(file: &Path, change: Change, format: Option<Format>, shrink: bool) -> anyhow::Result<()> {
    let old = disk::info(file, format)?.layers[0].size;
    let new = match change {
        Change::To(size) => Some(size),
        Change::Grow(more) => old.checked_add(more),
        Change::Shrink(less) => old.checked_sub(less),
    };
    let new = new.with_context(|| format!("{}: it has {}", Name(file), size::display(old)))?;
    let old = disk::resize(file, format, new, shrink)?;
    eprintln!("{}: a disk of {}, before {}", Name(file), size::display(new), size::display(old));
    Ok(())
}

fn check(file: &Path, repair: bool, json: bool) -> anyhow::Result<u8> {
    let (before, found) = match repair {
        true => qcow2::repair(file).map(|(before, after)| (Some(before), after))?,
        false => (None, qcow2::check(file)?),
    };
    let repaired = before.is_some_and(|before| !before.is_clean() && found.is_clean());
    print(&if json { findings_json(&found, repaired) } else { findings_text(&found, repaired) })?;
    Ok(match &found {
        found if found.errors > 0 || found.corrupt || found.dirty => ERRORS,
        found if found.leaks > 0 => LEAKS,
        _ => 0,
    })
}

fn findings_text(found: &qcow2::Findings, repaired: bool) -> String {
    let mut text = String::new();
    for error in &found.told {
        let _ = writeln!(text, "error: {error}");
    }
    let told = found.told.len() as u64;
    if found.errors > told {
        let _ = writeln!(text, "and {} more errors", found.errors - told);
    }
    if found.leaks > 0 {
        let bytes = size::display(found.leaks * found.cluster_size);
        let _ = writeln!(text, "lost space: {bytes} in {} clusters", found.leaks);
    }
    if found.corrupt {
        text += "the image is marked as damaged\n";
    }
    if found.dirty {
        text += "the image was not closed properly\n";
    }
    if found.is_clean() {
        text += if repaired { "repaired: no errors, no lost space\n" } else { "no errors, no lost space\n" };
    }
    let percent = 100.0 * found.allocated as f64 / found.clusters.max(1) as f64;
    let _ = writeln!(
        text,
        "{} of {} clusters are in the image ({percent:.1} %), {} compressed",
        found.allocated, found.clusters, found.compressed
    );
    text
}

fn findings_json(found: &qcow2::Findings, repaired: bool) -> String {
    let json = json!({
        "errors": found.errors,
        "messages": found.told,
        "leaks": found.leaks,
        "cluster_size": found.cluster_size,
        "clusters": found.clusters,
        "allocated": found.allocated,
        "compressed": found.compressed,
        "dirty": found.dirty,
        "corrupt": found.corrupt,
        "repaired": repaired,
    });
    format!("{json:#}\n")
}

fn info_text(info: &Info) -> String {
    let mut text = String::new();
    for (index, layer) in info.layers.iter().enumerate() {
        let what = if index == 0 { "image" } else { "backing file" };
        let _ = writeln!(text, "{what}: {}", Name(&layer.path));
        let mut line = |name: &str, value: String| {
            let _ = writeln!(text, "  {name:<14} {value}");
        };
        line("format", layer.format.name().into());
        line("disk", format!("{} ({} bytes)", size::display(layer.size), layer.size));
        line("takes up", size::display(layer.allocated));
        if let Some(header) = &layer.header {
            line("cluster size", size::display(header.cluster_size()));
            line("version", header.version.to_string());
            line("refcounts", format!("{} bits", 1 << header.refcount_order));
            if header.snapshots > 0 {
                line("snapshots", header.snapshots.to_string());
            }
            if let Some(mark) = mark(layer) {
                line("marked as", mark.into());
            }
            if let Some(backing) = &header.backing {
                let format = header.backing_format.as_deref().unwrap_or("found out");
                line("backing file", format!("{} ({format})", Name(Path::new(backing))));
            }
        }
    }
    if let Some(broken) = &info.broken {
        let _ = writeln!(text, "its backing file cannot be used: {broken}");
    }
    text
}

fn mark(layer: &Layer) -> Option<&'static str> {
    let header = layer.header.as_ref()?;
    match (header.is_corrupt(), header.is_dirty()) {
        (true, _) => Some("damaged"),
        (_, true) => Some("not closed properly"),
        _ => None,
    }
}

fn info_json(info: &Info) -> String {
    let layer = |layer: &Layer| {
        json!({
            "path": layer.path.to_string_lossy(),
            "format": layer.format.name(),
            "size": layer.size,
            "file_size": layer.file_size,
            "allocated": layer.allocated,
            "cluster_size": layer.header.as_ref().map(qcow2::Header::cluster_size),
            "version": layer.header.as_ref().map(|header| header.version),
            "snapshots": layer.header.as_ref().map(|header| header.snapshots),
            "backing": layer.header.as_ref().and_then(|header| header.backing.clone()),
            "backing_format": layer.header.as_ref().and_then(|header| header.backing_format.clone()),
            "mark": mark(layer),
        })
    };
    let layers: Vec<_> = info.layers.iter().map(layer).collect();
    format!("{:#}\n", json!({ "files": layers, "error": info.broken.as_ref().map(ToString::to_string) }))
}

/// To stdout; a reader that has seen enough is no error.
fn print(text: &str) -> anyhow::Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        done => Ok(done?),
    }
}
