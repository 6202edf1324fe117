//! What the command line says of the balloon and of the console's ports.

use vmm::config::{BalloonConfig, PortBackend, PortConfig};

use crate::size;

/// The longest name of a port, in bytes.
const MAX_NAME: usize = 64;

/// `--balloon [size=SIZE][,deflate-on-oom=on|off][,free-page-reporting=on|off][,control=SOCKET]`
///
/// # Errors
/// A message for the user.
pub fn balloon(text: &str) -> Result<BalloonConfig, String> {
    let mut balloon = BalloonConfig::default();
    balloon.options.deflate_on_oom = true;
    balloon.options.free_page_reporting = true;
    for option in text.split(',').filter(|option| !option.is_empty()) {
        match option.split_once('=') {
            Some(("size", size)) => balloon.options.size = size::parse(size)?,
            Some(("deflate-on-oom", state)) => balloon.options.deflate_on_oom = on_or_off(option, state)?,
            Some(("free-page-reporting", state)) => {
                balloon.options.free_page_reporting = on_or_off(option, state)?;
            }
            Some(("control", path)) if !path.is_empty() => balloon.control = Some(path.into()),
            _ => {
                return Err(format!(
                    "{option:?} is no option of a balloon: size=SIZE, deflate-on-oom=on|off, \
                     free-page-reporting=on|off, control=SOCKET"
                ));
            }
        }
    }
    Ok(balloon)
}

/// `--port name=NAME,path=PATH[,as=file|socket|pty]`
///
/// # Errors
/// A message for the user.
pub fn port(text: &str) -> Result<PortConfig, String> {
    let mut port = PortConfig { name: String::new(), path: "".into(), backend: PortBackend::File };
    for option in text.split(',') {
        match option.split_once('=') {
            Some(("name", name)) => port.name = name.to_owned(),
            Some(("path", path)) => port.path = path.into(),
            Some(("as", "file")) => port.backend = PortBackend::File,
            Some(("as", "socket")) => port.backend = PortBackend::Socket,
            Some(("as", "pty")) => port.backend = PortBackend::Pty,
            _ => {
                return Err(format!(
                    "{option:?} is no option of a port: name=NAME, path=PATH, as=file, as=socket, as=pty"
                ));
            }
        }
    }
    let plain = |c: char| c.is_ascii_graphic() && c != '/';
    if port.name.is_empty() || port.name.len() > MAX_NAME || !port.name.chars().all(plain) {
        return Err(format!(
            "a port needs a name, such as name=org.example.0: 1 to {MAX_NAME} letters, digits and signs but for /"
        ));
    }
    if port.path.as_os_str().is_empty() {
        return Err("a port leads somewhere: path=PATH".into());
    }
    Ok(port)
}

fn on_or_off(option: &str, state: &str) -> Result<bool, String> {
    match state {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("{option:?}: it is on or off")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_balloon_has_all_abilities_unless_it_is_told_otherwise() {
        let all = balloon("").unwrap();
        assert!(all.options.deflate_on_oom && all.options.free_page_reporting && all.options.size == 0);
        let some = balloon("size=64M,deflate-on-oom=off,free-page-reporting=off,control=/run/b").unwrap();
        assert!(!some.options.deflate_on_oom && !some.options.free_page_reporting);
        assert_eq!((some.options.size, some.control), (64 << 20, Some("/run/b".into())));
        for wrong in ["size=x", "size", "deflate-on-oom=1", "control=", "oom=on"] {
            assert!(balloon(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_port_has_a_name_and_leads_somewhere() {
        let some = port("name=org.example.0,path=/tmp/x,as=pty").unwrap();
        assert_eq!((some.name.as_str(), some.backend), ("org.example.0", PortBackend::Pty));
        assert_eq!(port("path=a,name=b").unwrap().backend, PortBackend::File);
        let long = format!("name={},path=x", "n".repeat(65));
        for wrong in
            ["name=a", "path=x", "name=a/b,path=x", "name=a\nb,path=x", "name=a,path=x,as=tcp", &long]
        {
            assert!(port(wrong).is_err(), "{wrong}");
        }
    }
}
