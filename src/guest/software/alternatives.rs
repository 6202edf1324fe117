//! The links that packages' `postinst` scripts would have update-alternatives(1) make, such as `awk` or `cc`. The scripts
//! are read for calls whose words are literal, never run.

use std::collections::BTreeMap;

/// A name that several packages can stand for, and the one that does.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Choice {
    priority: i64,
    /// Link → target; the first is the choice itself, the others follow it.
    links: Vec<(String, String)>,
}

/// The choices of all packages.
#[derive(Clone, Debug, Default)]
pub struct Alternatives {
    choices: BTreeMap<String, Choice>,
}

impl Alternatives {
    /// Reads a script.
    pub fn read(&mut self, script: &str) {
        let joined = script.replace("\\\n", " ");
        for command in joined.split(['\n', ';']).flat_map(|line| line.split("&&")) {
            if let Some((name, choice)) = parse(command)
                && self.choices.get(&name).is_none_or(|old| old.priority < choice.priority)
            {
                self.choices.insert(name, choice);
            }
        }
    }

    /// All links with their targets, both absolute.
    pub fn links(&self) -> impl Iterator<Item = (&str, &str)> {
        let links = self.choices.values().flat_map(|choice| &choice.links);
        links.map(|(link, target)| (link.as_str(), target.as_str()))
    }
}

/// `update-alternatives [--quiet] --install LINK NAME PATH PRIORITY [--slave LINK NAME PATH]…`
fn parse(command: &str) -> Option<(String, Choice)> {
    let words: Vec<&str> = command.split_whitespace().map(|word| word.trim_matches(['"', '\''])).collect();
    let at = words
        .iter()
        .position(|word| *word == "update-alternatives" || word.ends_with("/update-alternatives"))?;
    let words = &words[at + 1..];
    let install = words.iter().position(|word| *word == "--install")?;
    let [link, name, path, priority, rest @ ..] = &words[install + 1..] else { return None };
    let mut links = vec![(*link, *path)];
    let mut rest = rest;
    while let ["--slave", link, _, path, after @ ..] = rest {
        links.push((link, path));
        rest = after;
    }
    let literal = |path: &str| path.starts_with('/') && !path.contains(['$', '`', '*', '{']);
    let links: Vec<_> = links.into_iter().filter(|(link, path)| literal(link) && literal(path)).collect();
    if links.first().map(|(first, _)| first) != Some(link) {
        return None;
    }
    let links = links.into_iter().map(|(link, path)| (link.to_owned(), path.to_owned())).collect();
    Some(((*name).to_owned(), Choice { priority: priority.parse().ok()?, links }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn links(scripts: &[&str]) -> Vec<String> {
        let mut alternatives = Alternatives::default();
        scripts.iter().for_each(|script| alternatives.read(script));
        alternatives.links().map(|(link, target)| format!("{link} {target}")).collect()
    }

    #[test]
    fn a_choice_and_what_follows_it_become_links() {
        let script = "#!/bin/sh\nset -e\nif [ \"$1\" = configure ]; then\n  update-alternatives --quiet --install \\\n    \
                      /usr/bin/awk awk /usr/bin/mawk 5 \\\n    --slave /usr/bin/nawk nawk \"/usr/bin/mawk\"\nfi\n";
        assert_eq!(links(&[script]), ["/usr/bin/awk /usr/bin/mawk", "/usr/bin/nawk /usr/bin/mawk"]);
    }

    #[test]
    fn the_highest_priority_wins_whatever_the_order() {
        let low = "update-alternatives --install /usr/bin/cc cc /usr/bin/tcc 10";
        let high = "true && update-alternatives --quiet --install /usr/bin/cc cc /usr/bin/gcc 20; true";
        assert_eq!(links(&[low, high]), ["/usr/bin/cc /usr/bin/gcc"]);
        assert_eq!(links(&[high, low]), ["/usr/bin/cc /usr/bin/gcc"]);
    }

    #[test]
    fn what_is_not_literal_is_left_alone() {
        assert!(links(&["update-alternatives --install /usr/bin/$x $x /usr/bin/y 5"]).is_empty());
        assert!(links(&["update-alternatives --install a b c 5"]).is_empty());
        assert!(links(&["update-alternatives --remove awk /usr/bin/mawk"]).is_empty());
        assert!(links(&["update-alternatives --install /usr/bin/x x"]).is_empty());
        assert!(links(&["update-alternatives --install /usr/bin/x x /usr/bin/y high"]).is_empty());
    }
}
