//! Sizes as a person writes them.

/// Parses a size in bytes: digits and an optional suffix K, M, G or T (binary, `KiB` and `KB` are the same), without
/// regard to case. A number without a suffix is bytes.
///
/// # Errors
/// A message for the user that names the value.
pub fn parse(text: &str) -> Result<u64, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, suffix) = text.split_at(digits);
    let shift = match suffix.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(format!("`{text}` is not a size: write a number and K, M, G or T, as in 512M")),
    };
    if number.is_empty() {
        return Err(format!("`{text}` is not a size: it has no number; write for example 512M"));
    }
    let too_big = || format!("`{text}` is more than 2^64 bytes");
    number.parse::<u64>().map_err(|_| too_big())?.checked_mul(1 << shift).ok_or_else(too_big)
}

/// A size with the largest binary unit that keeps it readable: `512 MiB`, `1.5 GiB`.
pub fn display(bytes: u64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let unit = (bytes.max(1).ilog2() as usize / 10).min(units.len() - 1);
    let scaled = bytes as f64 / (1u64 << (10 * unit)) as f64;
    let tenths = (scaled * 10.0).round() / 10.0;
    if tenths.fract() == 0.0 {
        format!("{tenths:.0} {}", units[unit])
    } else {
        format!("{tenths:.1} {}", units[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_are_binary_and_case_does_not_matter() {
        assert_eq!(parse("4096"), Ok(4096));
        assert_eq!(parse("64k"), Ok(65536));
        assert_eq!(parse("512M"), Ok(512 << 20));
        assert_eq!(parse("3GiB"), Ok(3 << 30));
        assert_eq!(parse("1T"), Ok(1 << 40));
    }

    #[test]
    fn what_is_no_size_is_named() {
        for bad in ["", "M", "12Q", "-5M", "1.5G", "5 M", "0x100", "99999999999999999999", "99999999999T"] {
            let message = parse(bad).unwrap_err();
            assert!(message.contains(&format!("`{bad}`")), "{message}");
        }
    }

    #[test]
    fn sizes_are_shown_in_a_readable_unit() {
        assert_eq!(display(0), "0 bytes");
        assert_eq!(display(512 << 20), "512 MiB");
        assert_eq!(display((1 << 30) + (1 << 29)), "1.5 GiB");
    }
}
