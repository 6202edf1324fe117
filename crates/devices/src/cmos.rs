//! cmos
