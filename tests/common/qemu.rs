//! Where QEMU's software CPU differs from the manual: what the guests find, and what the manual says.

/// Guest, check, and the manual's rule that the check holds.
pub const DEVIATIONS: &[(&str, &str, &str)] = &[];
