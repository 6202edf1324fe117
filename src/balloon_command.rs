//! `ringside balloon`: the size of a running guest's balloon.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, bail};

use crate::{size, terminal};

/// Asks for another size, where there is one, and tells how the balloon is.
///
/// # Errors
/// What keeps the guest's Ringside from being asked.
pub fn run(socket: &Path, target: Option<u64>) -> anyhow::Result<u8> {
    let name = || format!("cannot ask {}", socket.display());
    let mut stream = UnixStream::connect(socket).with_context(name)?;
    let line = target.map_or_else(|| "state\n".to_owned(), |bytes| format!("target {bytes}\n"));
    stream.write_all(line.as_bytes()).with_context(name)?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply).with_context(name)?;
    if let Some(error) = reply.strip_prefix("error ") {
        bail!("{}: {}", socket.display(), error.trim_end());
    }
    let mut out = String::new();
    for (name, value) in reply.lines().filter_map(|line| line.split_once(' ')) {
        let bytes =
            matches!(name, "target" | "actual" | "given-back" | "free" | "total" | "available" | "caches");
        let value = match value.parse() {
            Ok(number) if bytes => size::display(number),
            _ => value.to_owned(),
        };
        out.push_str(&format!("{name:<18} {value}\n"));
    }
    if let Err(error) = std::io::stdout().write_all(out.as_bytes()) {
        terminal::say(&format!("ringside: {error}\n"));
    }
    Ok(0)
}
