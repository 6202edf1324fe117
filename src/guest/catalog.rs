//! The guests that have a name.

use super::GuestError;

/// A guest that can be fetched: which packages it is made of.
#[derive(Debug, PartialEq, Eq)]
pub struct Guest {
    /// Its name on the command line.
    pub name: &'static str,
    /// The metapackage whose dependency is the kernel.
    pub kernel: &'static str,
    /// The package with the static busybox.
    pub busybox: &'static str,
    /// What it is, for a person.
    pub description: &'static str,
}

/// Every guest, the default one first.
pub const GUESTS: &[Guest] = &[
    Guest {
        name: "debian",
        kernel: "linux-image-amd64",
        busybox: "busybox-static",
        description: "Debian's generic kernel, with every driver, and busybox",
    },
    Guest {
        name: "debian-cloud",
        kernel: "linux-image-cloud-amd64",
        busybox: "busybox-static",
        description: "Debian's kernel for clouds (a third of the download; no e1000, no 9p), and busybox",
    },
];

/// Finds a guest by its name.
///
/// # Errors
/// [`GuestError::UnknownGuest`].
pub fn find(name: &str) -> Result<&'static Guest, GuestError> {
    GUESTS
        .iter()
        .find(|guest| guest.name == name)
        .ok_or_else(|| GuestError::UnknownGuest { name: name.chars().take(100).collect() })
}

/// The names, for messages: `debian, debian-cloud`.
pub fn names() -> String {
    GUESTS.iter().map(|guest| guest.name).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_name_is_answered_with_those_that_there_are() {
        assert_eq!(find("debian").map(|guest| guest.kernel).ok(), Some("linux-image-amd64"));
        let error = find("plan9").unwrap_err().to_string();
        assert!(error.contains("plan9") && error.contains("debian, debian-cloud"), "{error}");
    }
}
