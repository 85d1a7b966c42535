//! The table of options for people to read: on a terminal, in the README, as a manual page.

use super::{
    Surface,
    table::{Entry, TABLE},
};

/// The forms that each surface has, the one that is heard first.
const FORMS: &[(Surface, &str, &str)] = &[
    (
        Surface::Endpoint,
        "container",
        "Podman: `--network NETWORK:KEY=VALUE,…`; Docker: `--network \
         name=NETWORK,driver-opt=KEY=VALUE`, `network connect --driver-opt KEY=VALUE`, or \
         `driver_opts` in a compose file",
    ),
    (
        Surface::Label,
        "label",
        "label or annotation `tailscale.KEY=VALUE`; for those who move over also \
         `tailscale.com/KEY`, and `TS_HOSTNAME`, `TS_ROUTES`, `TS_ACCEPT_DNS` and `TS_EXTRA_ARGS` \
         as labels or annotations or, with Podman, in the container's environment",
    ),
    (
        Surface::Network,
        "network",
        "`network create -d tailscale -o KEY=VALUE NETWORK`",
    ),
    (
        Surface::File,
        "file",
        "`/etc/tailnode/config.toml`: `KEY = \"VALUE\"`; tailnoded reads it when it starts",
    ),
];

/// Why it is so, in one sentence each.
const REASONS: &[&str] = &[
    "What is set on a container is heard over its labels, those over the network, that over the file.",
    "Labels come with images too, so neither they nor a container choose a tailnet or a key. The rest \
     concerns only the container's own node, and the tailnet's policy decides which tags and routes it \
     gets.",
    "Where that is too much trust, `lock=tags+exit-node` on the network, or in the file, keeps these \
     options as they are set there: a container that sets one does not start, and a lock in the file \
     binds networks too.",
];

/// For a terminal.
pub fn text() -> String {
    let mut text = String::new();
    for entry in TABLE {
        text += &format!(
            "{} {}\n    {} [{}]\n    set on: {}\n",
            entry.key,
            entry.value,
            entry.help,
            entry.default,
            places(entry)
        );
    }
    text += "\nWhere they are set, the first one heard:\n";
    for (_, place, form) in FORMS {
        text += &format!("  {place:10} {form}\n");
    }
    text += "\n";
    for reason in REASONS {
        text += &format!("{reason}\n");
    }
    text
}

/// The table of the README.
pub fn markdown() -> String {
    let mut text =
        "| option | values | set on | meaning | else |\n|---|---|---|---|---|\n".to_owned();
    for entry in TABLE {
        text += &format!(
            "| `{}` | `{}` | {} | {} | {} |\n",
            entry.key,
            entry.value.to_string().replace('|', "\\|"),
            places(entry),
            entry.help,
            entry.default,
        );
    }
    text += "\n| place | how |\n|---|---|\n";
    for (_, place, form) in FORMS {
        text += &format!("| {place} | {form} |\n");
    }
    for reason in REASONS {
        text += &format!("\n{reason}\n");
    }
    text
}

/// The page tailnode-options(7), for man(1).
pub fn page() -> String {
    let mut text = ".TH TAILNODE\\-OPTIONS 7 \"\" tailnode\n.SH NAME\n\
        tailnode\\-options \\- what can be set for a container's node\n.SH DESCRIPTION\n"
        .to_owned();
    for reason in REASONS {
        text += &format!("{}\n.PP\n", roff(reason));
    }
    text += ".SH OPTIONS\n";
    for entry in TABLE {
        text += &format!(
            ".TP\n.BR {} = \\fI{}\\fR\n{}. Else: {}.\n.br\nSet on: {}. Example: {}={}\n",
            roff(entry.key),
            roff(&entry.value.to_string()),
            roff(entry.help),
            roff(entry.default),
            places(entry),
            roff(entry.key),
            roff(entry.examples[0]),
        );
    }
    text += ".SH PLACES\nThe first one is heard.\n";
    for (_, place, form) in FORMS {
        text += &format!(".TP\n.B {place}\n{}\n", roff(form));
    }
    text +=
        ".SH SEE ALSO\n.B tailnode explain\nprints what holds for a container, and who set it.\n";
    text
}

fn places(entry: &Entry) -> String {
    let places = FORMS
        .iter()
        .filter(|(surface, ..)| entry.surfaces.contains(surface));
    let places: Vec<_> = places.map(|(_, place, _)| *place).collect();
    places.join(", ")
}

/// Text as roff(7) prints it as it is.
fn roff(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-");
    let text = text.replace('…', "...").replace('"', "\\(dq");
    // What is between backticks is bold.
    let parts = text.split('`').enumerate();
    let text: String = parts
        .map(|(at, part)| match at % 2 {
            0 => part.to_owned(),
            _ => format!("\\fB{part}\\fR"),
        })
        .collect();
    match text.strip_prefix(['.', '\'']) {
        Some(_) => format!("\\&{text}"),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    const BEGIN: &str = "<!-- from plugin/src/options/table.rs, by `make manual` -->\n";
    const END: &str = "<!-- end -->";

    /// What is in the tree is what the table gives; `make manual` writes it.
    fn agrees(file: &str, made: impl Fn(&str) -> String) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(file);
        if std::env::var_os("TAILNODE_WRITE_MANUAL").is_some() {
            let there = fs::read_to_string(&path).unwrap_or_default();
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, made(&there)).unwrap();
        }
        let there = fs::read_to_string(&path).unwrap();
        assert!(there == made(&there), "{file} is old: run `make manual`");
    }

    #[test]
    fn the_readme_has_the_table() {
        agrees("README.md", |readme| {
            let (before, rest) = readme.split_once(BEGIN).expect("the table's beginning");
            let (_, after) = rest.split_once(END).expect("the table's end");
            format!("{before}{BEGIN}\n{}\n{END}{after}", markdown())
        });
    }

    #[test]
    fn the_manual_page_has_the_table() {
        agrees("packaging/man/tailnode-options.7", |_| page());
    }

    #[test]
    fn all_forms_name_every_option() {
        for entry in TABLE {
            for text in [text(), markdown(), page().replace("\\-", "-")] {
                for word in [entry.key, entry.help, entry.default] {
                    assert!(text.contains(word), "{word} is not in {text}");
                }
            }
        }
    }
}
