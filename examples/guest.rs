//! Fetches a default guest and prints where it is: `cargo run --example guest [NAME]`.

use ringside::guest;

fn main() -> Result<(), guest::GuestError> {
    let name = std::env::args().nth(1).unwrap_or_else(|| "debian".to_owned());
    let files = guest::fetch(&name, &mut *guest::to_stderr())?;
    println!("{}\n{}\n{}", files.kernel.display(), files.initrd.display(), files.cmdline);
    Ok(())
}
