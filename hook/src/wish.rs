//! What a container's annotations ask for.

use std::collections::BTreeMap;

use tailnode_plugin::options::TUN_ANNOTATION;

const PREFIX: &str = "tailscale.";

/// What is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// What a tunnel of its own needs.
    pub tun: bool,
    /// A node.
    pub joins: bool,
}

impl Wish {
    /// Reads annotations. Whether the options of the node are good is the daemon's to say.
    pub fn of(annotations: &BTreeMap<String, String>) -> Result<Wish, String> {
        let tun = match annotations.get(TUN_ANNOTATION).map(String::as_str) {
            None | Some("false") => false,
            Some("true") => true,
            Some(other) => {
                return Err(format!(
                    "the annotation {TUN_ANNOTATION} is `{other}`: use true or false"
                ));
            }
        };
        let joins = ours(annotations).any(|(key, _)| key != TUN_ANNOTATION);
        Ok(Wish { tun, joins })
    }
}

/// Whether anything is asked for.
pub fn is_any(annotations: &BTreeMap<String, String>) -> bool {
    ours(annotations).next().is_some()
}

/// The annotations that are ours. `tailscale.com/…` are words of Tailscale's operator of Kubernetes.
pub fn ours(annotations: &BTreeMap<String, String>) -> impl Iterator<Item = (&str, &str)> {
    let pairs = annotations.iter().map(|(k, v)| (k.as_str(), v.as_str()));
    pairs.filter(|(key, _)| key.starts_with(PREFIX) && !key.contains('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(pairs: &[(&str, &str)]) -> Result<Wish, String> {
        let pairs = pairs.iter().map(|(k, v)| ((*k).into(), (*v).into()));
        Wish::of(&pairs.collect())
    }

    #[test]
    fn annotations_ask_for_a_device_or_a_node_or_both_or_nothing() {
        let both = |tun, joins| Ok(Wish { tun, joins });
        let others = ("tailscale.com/expose", "true");
        assert_eq!(wish(&[]), both(false, false));
        assert_eq!(wish(&[others, ("tailscalex", "1")]), both(false, false));
        assert_eq!(wish(&[(TUN_ANNOTATION, "true")]), both(true, false));
        assert_eq!(wish(&[(TUN_ANNOTATION, "false")]), both(false, false));
        let name = ("tailscale.hostname", "web");
        assert_eq!(wish(&[others, name]), both(false, true));
        assert_eq!(wish(&[name, (TUN_ANNOTATION, "true")]), both(true, true));
        // One that does not exist asks for a node too, or a slip of the pen would go unnoticed.
        assert_eq!(wish(&[("tailscale.hostnme", "web")]), both(false, true));
        let refused = wish(&[(TUN_ANNOTATION, "yes")]).unwrap_err();
        assert!(refused.contains("`yes`: use true or false"), "{refused}");
    }
}
