//! What the variables of Tailscale's own container image mean in tailnode's words
//! (cmd/containerboot/settings.go), for people who move over.

use super::table::{self, NEEDLESS_FLAGS, TABLE, Value};

/// The variable that holds flags of `tailscale up`.
pub(super) const FLAGS: &str = "TS_EXTRA_ARGS";

/// The flag that asks for something by being false.
const MASQUERADE: &str = "snat-subnet-routes";

/// An option, as some word of Tailscale's sets it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Word {
    /// The option's name; for a word without an equivalent, that word.
    pub key: String,
    /// Its value.
    pub value: String,
}

/// What the variable `name` sets: nothing, if it is not one of Tailscale's, or says only how their
/// container is to run. A word that tailnode does not know becomes the key of what is returned.
pub fn of_variable(name: &str, value: &str) -> Vec<Word> {
    if name == FLAGS {
        return of_flags(value);
    }
    let entry = TABLE.iter().find(|entry| entry.variables.contains(&name));
    match entry {
        // As their container has it, an empty variable is none.
        _ if value.is_empty() => Vec::new(),
        Some(entry) => vec![word(entry.key, entry.value, value)],
        None if table::missing(name).is_some() => vec![Word {
            key: name.to_owned(),
            value: value.to_owned(),
        }],
        None => Vec::new(),
    }
}

/// Flags as Go's package flag takes them, split as containerboot does: at white space.
fn of_flags(text: &str) -> Vec<Word> {
    let mut words = Vec::new();
    let mut arguments = text.split_whitespace().peekable();
    while let Some(argument) = arguments.next() {
        // It is not repeated: it may be a secret that lost its flag.
        let flag = match argument.trim_start_matches('-') {
            flag if flag == argument => "a word that is no flag",
            flag => flag,
        };
        let (flag, given) = match flag.split_once('=') {
            Some((flag, value)) => (flag, Some(value)),
            None => (flag, None),
        };
        let entry = TABLE
            .iter()
            .find(|entry| entry.key == flag || entry.flags.contains(&flag));
        let needless = NEEDLESS_FLAGS
            .iter()
            .find(|(needless, _)| *needless == flag);
        let takes_value = match (entry, needless) {
            (Some(entry), _) => entry.value != Value::Flag,
            (None, Some((_, takes_value))) => *takes_value,
            (None, None) => false,
        };
        let value = match given {
            Some(value) => value,
            None if takes_value => arguments.next().unwrap_or_default(),
            None => "true",
        };
        match entry {
            Some(entry) => words.push(word(entry.key, entry.value, value)),
            // `--ssh=false` asks for nothing, nor does what is so anyway.
            None if needless.is_some() || is_false(value) != (flag == MASQUERADE) => {}
            None => words.push(Word {
                key: flag.to_owned(),
                value: value.to_owned(),
            }),
        }
    }
    words
}

fn word(key: &str, kind: Value, value: &str) -> Word {
    // As Go's strconv.ParseBool has it.
    let value = match (kind, value) {
        (Value::Flag, "1" | "t" | "T" | "TRUE" | "True") => "true",
        (Value::Flag, value) if is_false(value) => "false",
        _ => value,
    };
    Word {
        key: key.to_owned(),
        value: value.to_owned(),
    }
}

fn is_false(value: &str) -> bool {
    matches!(value, "0" | "f" | "F" | "false" | "FALSE" | "False")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn told(name: &str, value: &str) -> Vec<(String, String)> {
        let words = of_variable(name, value).into_iter();
        words.map(|word| (word.key, word.value)).collect()
    }

    #[test]
    fn variables_of_tailscales_container() {
        for (name, value, wanted) in [
            ("TS_HOSTNAME", "web", &[("hostname", "web")][..]),
            ("TS_HOSTNAME", "", &[]),
            ("TS_ACCEPT_DNS", "1", &[("accept-dns", "true")]),
            (
                "TS_ROUTES",
                "10.0.0.0/24,fd00::/64",
                &[("advertise-routes", "10.0.0.0/24,fd00::/64")],
            ),
            ("TS_AUTHKEY", "k", &[("auth-key", "k")]),
            ("TS_STATE_DIR", "/state", &[]),
            ("TS_USERSPACE", "true", &[]),
            ("TS_NODE_PROJECT", "of another program", &[]),
            (
                "TS_SERVE_CONFIG",
                "/serve.json",
                &[("TS_SERVE_CONFIG", "/serve.json")],
            ),
            (
                "TS_EXTRA_ARGS",
                "--advertise-tags=tag:a,tag:b -accept-routes --exit-node gw --reset --timeout 30s \
                 --ssh=false --exit-node-allow-lan-access=T",
                &[
                    ("tags", "tag:a,tag:b"),
                    ("accept-routes", "true"),
                    ("exit-node", "gw"),
                    ("exit-node-allow-lan-access", "true"),
                ],
            ),
            (
                "TS_EXTRA_ARGS",
                "--ssh --frob=1",
                &[("ssh", "true"), ("frob", "1")],
            ),
            (
                "TS_EXTRA_ARGS",
                "--reset secret --client-secret abc",
                &[("a word that is no flag", "true"), ("auth-key", "abc")],
            ),
            ("TS_EXTRA_ARGS", "--snat-subnet-routes", &[]),
            (
                "TS_EXTRA_ARGS",
                "--snat-subnet-routes=false",
                &[("snat-subnet-routes", "false")],
            ),
            ("TS_EXTRA_ARGS", "--exit-node", &[("exit-node", "")]),
        ] {
            let wanted: Vec<_> = wanted
                .iter()
                .map(|(key, value)| (key.to_string(), value.to_string()))
                .collect();
            assert_eq!(told(name, value), wanted, "{name}={value}");
        }
    }

    proptest! {
        #[test]
        fn no_flags_panic(text: String) {
            of_variable(FLAGS, &text);
        }
    }
}
