//! Small loops on the software CPU and, the same bytes, on the host: million instructions a second by class.
//!
//! `cargo bench --bench interpreter [-- NAME…]` runs the loops whose name contains one of the words, or all. What the
//! columns mean is in benches/README.md.

mod guest;
mod kernels;
#[path = "../timing/mod.rs"]
mod timing;

use anyhow::Context;
use guest::Guest;
use kernels::Kernel;
use timing::nanoseconds_each;

fn main() -> anyhow::Result<()> {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let wanted = |kernel: &&Kernel| wanted.is_empty() || wanted.iter().any(|word| kernel.name.contains(word));
    let mut guest = Guest::new()?;
    println!(
        "{:<44}{:>11}{:>10}{:>10}{:>10}{:>9}",
        "loop", "insns/turn", "ns/turn", "Minstr/s", "host", "slower"
    );
    for kernel in kernels::all().iter().filter(wanted).filter(|kernel| kernel.can_run()) {
        measure(&mut guest, kernel).context(kernel.name)?;
    }
    Ok(())
}

/// One line of the table.
fn measure(guest: &mut Guest, kernel: &Kernel) -> anyhow::Result<()> {
    guest.load(kernel.code())?;
    // A few turns first: that the loop comes to its end in the guest is found out before anything waits for it.
    let few = 100;
    let instructions = (guest.run(2 * few)? - guest.run(few)?) as f64 / few as f64;
    let mut failure = None;
    let soft = nanoseconds_each(|turns| {
        if failure.is_none() {
            failure = guest.run(turns).err();
        }
    });
    if let Some(failure) = failure {
        return Err(failure);
    }
    let host = kernel.native().map(nanoseconds_each);
    let rate = |nanoseconds: f64| format!("{:.1}", instructions * 1e3 / nanoseconds);
    println!(
        "{:<44}{:>11.1}{:>10.1}{:>10}{:>10}{:>9}",
        kernel.name,
        instructions,
        soft,
        rate(soft),
        host.map_or("-".into(), rate),
        host.map_or("-".into(), |host| format!("{:.1} x", soft / host)),
    );
    Ok(())
}
