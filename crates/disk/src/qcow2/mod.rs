//! qcow2 images. *Qcow2 Image File Format*, which QEMU's documentation holds.
//!
//! [`Header`] is parsed and checked here, [`check`] walks the tables; reading and writing is `imago`'s.

mod check;
mod header;
mod image;
mod rebuild;
mod tables;

pub(crate) use check::has_errors;
pub use check::{Findings, check, repair};
pub use header::Header;
pub(crate) use image::{Qcow2Disk, caught};
pub(crate) use tables::check_reachable;
