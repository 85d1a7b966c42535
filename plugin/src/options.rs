//! The options of a node: one vocabulary, named after the flags of `tailscale up`, on whatever
//! surface it is given.

use std::{collections::BTreeMap, fs, io, net::IpAddr, path::Path};

use ipnet::IpNet;
use tailnode_node::{ExitNode, RoutePreferences};
use tailnode_tun::Exit;
use url::Url;

use crate::{Error, secrets::KeySource};

/// Tailscale's own control server (ipn/prefs.go).
const DEFAULT_LOGIN_SERVER: &str = "https://controlplane.tailscale.com";

/// Longest DNS label, RFC 1035 section 2.3.4.
const MAX_LABEL: usize = 63;

const KEYS: [&str; 11] = [
    "hostname",
    "login-server",
    "auth-key",
    "require-login",
    "ephemeral",
    "tags",
    "accept-routes",
    "advertise-routes",
    "advertise-exit-node",
    "exit-node",
    "exit-node-allow-lan-access",
];

/// What is set on one surface: the configuration file, a network, a container's labels, or the
/// container's own use of the network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The name to ask for, a DNS label.
    pub hostname: Option<String>,
    /// The control server.
    pub login_server: Option<Url>,
    /// Where the key to join with is.
    pub auth_key: Option<KeySource>,
    /// Whether a container does not start before its node was let in.
    pub require_login: Option<bool>,
    /// Whether the tailnet forgets the node when the container stops.
    pub ephemeral: Option<bool>,
    /// Tags to ask for, `tag:` included.
    pub tags: Option<Vec<String>>,
    /// Whether to take the subnets that peers route.
    pub accept_routes: Option<bool>,
    /// Subnets to route for the tailnet.
    pub advertise_routes: Option<Vec<IpNet>>,
    /// Whether to be an exit for the tailnet.
    pub advertise_exit_node: Option<bool>,
    /// The peer by which everything leaves.
    pub exit_node: Option<ExitNode>,
    /// Whether the networks that the container is on are still reached without it.
    pub exit_node_allow_lan_access: Option<bool>,
}

impl Options {
    /// Reads the options of a network, `-o key=value`.
    pub fn of_network(pairs: &BTreeMap<String, String>) -> Result<Self, Error> {
        parse(pairs, Place::Network)
    }

    /// Reads the options of one container on a network: Podman's `--network NAME:key=value`,
    /// Docker's `driver-opt`.
    pub fn of_container(pairs: &BTreeMap<String, String>) -> Result<Self, Error> {
        parse(pairs, Place::Container)
    }

    /// Reads a container's labels. Only the name can be set by one: labels come with images too,
    /// and an image must not choose the tailnet or the key.
    pub fn of_labels(labels: &BTreeMap<String, String>) -> Result<Self, Error> {
        // The Kubernetes operator's word, for people who move over; ours wins.
        let theirs = labels.get("tailscale.com/hostname");
        let mut pairs: BTreeMap<String, String> = labels
            .iter()
            .filter_map(|(label, value)| {
                let key = label.strip_prefix("tailscale.")?;
                (!key.contains('/')).then(|| (key.to_owned(), value.clone()))
            })
            .collect();
        if let Some(name) = theirs {
            pairs.entry("hostname".into()).or_insert(name.clone());
        }
        parse(&pairs, Place::Label)
    }

    /// Reads the host's configuration file; one that does not exist sets nothing.
    pub fn of_file(path: &Path) -> Result<Self, Error> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(cause) => return Err(Error::file("read", path)(cause)),
        };
        let bad = |reason: String| Error::Config {
            path: path.to_owned(),
            reason,
        };
        let table: toml::Table = text.parse().map_err(|error: toml::de::Error| {
            // Only the message: the error's other form quotes the line, which may be a key.
            let before = error.span().and_then(|span| text.get(..span.start));
            let line = 1 + before.unwrap_or_default().matches('\n').count();
            bad(format!("line {line}: {}", error.message()))
        })?;
        let mut pairs = BTreeMap::new();
        for (key, value) in table {
            let value = option_text(&value).ok_or_else(|| {
                bad(format!(
                    "`{key}` must be a text, true, false or a list of texts"
                ))
            })?;
            pairs.insert(key, value);
        }
        parse(&pairs, Place::File).map_err(|error| bad(error.to_string()))
    }

    /// These, and where they say nothing, the `lower` ones.
    pub fn over(self, lower: Options) -> Options {
        Options {
            hostname: self.hostname.or(lower.hostname),
            login_server: self.login_server.or(lower.login_server),
            auth_key: self.auth_key.or(lower.auth_key),
            require_login: self.require_login.or(lower.require_login),
            ephemeral: self.ephemeral.or(lower.ephemeral),
            tags: self.tags.or(lower.tags),
            accept_routes: self.accept_routes.or(lower.accept_routes),
            advertise_routes: self.advertise_routes.or(lower.advertise_routes),
            advertise_exit_node: self.advertise_exit_node.or(lower.advertise_exit_node),
            exit_node: self.exit_node.or(lower.exit_node),
            exit_node_allow_lan_access: self
                .exit_node_allow_lan_access
                .or(lower.exit_node_allow_lan_access),
        }
    }

    /// Which routes the node takes and offers; an error where they contradict each other.
    pub fn routes(&self) -> Result<RoutePreferences, Error> {
        let advertise_exit = self.advertise_exit_node.unwrap_or(false);
        match &self.exit_node {
            Some(_) if advertise_exit => Err(Error::BothExits),
            exit_node => Ok(RoutePreferences {
                accept: self.accept_routes.unwrap_or(false),
                advertise: self.advertise_routes.clone().unwrap_or_default(),
                advertise_exit,
                exit_node: exit_node.clone(),
            }),
        }
    }

    /// What leaves by the node's device because of its exit.
    pub fn exit(&self) -> Exit {
        match (&self.exit_node, self.exit_node_allow_lan_access) {
            (None, _) => Exit::No,
            (Some(_), Some(true)) => Exit::BesideLan,
            (Some(_), _) => Exit::Everything,
        }
    }

    /// Where to log in.
    pub fn login_server(&self) -> Result<Url, Error> {
        match &self.login_server {
            Some(url) => Ok(url.clone()),
            None => parse_url(DEFAULT_LOGIN_SERVER, Place::File),
        }
    }
}

/// Makes a DNS label of a container's name, or `None` if nothing of it can be in one.
pub fn dns_label(name: &str) -> Option<String> {
    let label: String = name
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() {
                c.to_ascii_lowercase()
            } else {
                '-'
            }
        })
        .collect();
    // Cut before trimming, so that it cannot end in a hyphen; every character is one byte now.
    let label = label.trim_start_matches('-');
    let label = label
        .get(..MAX_LABEL)
        .unwrap_or(label)
        .trim_end_matches('-');
    (!label.is_empty()).then(|| label.to_owned())
}

/// The label of the `number`th container that wants the label `hostname`.
pub(crate) fn numbered_label(hostname: &str, number: usize) -> String {
    let suffix = format!("-{number}");
    let room = MAX_LABEL.saturating_sub(suffix.len());
    hostname.get(..room).unwrap_or(hostname).to_owned() + &suffix
}

/// The surface an option is given on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    File,
    Network,
    Label,
    Container,
}

impl Place {
    fn words(self) -> &'static str {
        match self {
            Place::File => "in the configuration file",
            Place::Network => "on the network",
            Place::Label => "in a container's label",
            Place::Container => "on one container",
        }
    }

    /// Where the option belongs instead, if not here.
    fn refuses(self, key: &str) -> Option<&'static str> {
        match (self, key) {
            (Place::File, "hostname") => {
                Some("it would be every container's; set it on one: `--network NAME:hostname=web`")
            }
            (Place::Label | Place::Container, "login-server" | "auth-key") => Some(
                "it belongs to the network: `network create -d tailscale -o …`, or to /etc/tailnode/config.toml",
            ),
            (Place::Label, key) if key != "hostname" => Some(
                "labels come with images too; set it on the network (`-o`) or on the container's use of it",
            ),
            _ => None,
        }
    }
}

fn parse(pairs: &BTreeMap<String, String>, place: Place) -> Result<Options, Error> {
    let mut options = Options::default();
    for (key, value) in pairs {
        let known =
            KEYS.into_iter()
                .find(|known| known == key)
                .ok_or_else(|| Error::UnknownOption {
                    key: key.clone(),
                    place: place.words(),
                    advice: nearest(key),
                })?;
        if let Some(advice) = place.refuses(known) {
            return Err(Error::MisplacedOption {
                key: known,
                place: place.words(),
                advice,
            });
        }
        match known {
            "hostname" => options.hostname = Some(parse_hostname(value, place)?),
            "login-server" => options.login_server = Some(parse_url(value, place)?),
            "auth-key" => options.auth_key = Some(parse_auth_key(value, place)?),
            "require-login" => options.require_login = Some(parse_bool(known, value, place)?),
            "ephemeral" => options.ephemeral = Some(parse_bool(known, value, place)?),
            "tags" => options.tags = Some(parse_tags(value, place)?),
            "accept-routes" => options.accept_routes = Some(parse_bool(known, value, place)?),
            "advertise-routes" => options.advertise_routes = Some(parse_routes(value, place)?),
            "advertise-exit-node" => {
                options.advertise_exit_node = Some(parse_bool(known, value, place)?);
            }
            "exit-node" => options.exit_node = Some(parse_exit_node(value, place)?),
            _ => options.exit_node_allow_lan_access = Some(parse_bool(known, value, place)?),
        }
    }
    options.routes()?;
    Ok(options)
}

fn nearest(key: &str) -> String {
    let key = key.to_ascii_lowercase().replace('_', "-");
    let (distance, known) = KEYS
        .into_iter()
        .map(|known| (strsim::damerau_levenshtein(&key, known), known))
        .min()
        .unwrap_or((usize::MAX, ""));
    if distance <= 3 {
        format!("did you mean `{known}`?")
    } else {
        format!("there are {}", KEYS.join(", "))
    }
}

fn bad(key: &'static str, place: Place, reason: impl Into<String>) -> Error {
    Error::BadOption {
        key,
        place: place.words(),
        reason: reason.into(),
    }
}

fn parse_hostname(value: &str, place: Place) -> Result<String, Error> {
    dns_label(value).ok_or_else(|| {
        bad(
            "hostname",
            place,
            format!("{value:?} has no letter or digit to make a DNS name of"),
        )
    })
}

fn parse_url(value: &str, place: Place) -> Result<Url, Error> {
    let bad = |reason| bad("login-server", place, reason);
    let url: Url = value.parse().map_err(|error| {
        bad(format!(
            "{value:?} is no URL ({error}); it should look like https://headscale.example.com"
        ))
    })?;
    if !matches!(url.scheme(), "http" | "https") || url.host().is_none() {
        return Err(bad(format!(
            "{value:?} must begin with https:// or http:// and name a host"
        )));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(bad("it must not hold a user or a password".into()));
    }
    Ok(url)
}

fn parse_auth_key(value: &str, place: Place) -> Result<KeySource, Error> {
    // The value is not repeated: it may be a key, and this goes to terminals and logs.
    KeySource::parse(value).map_err(|reason| bad("auth-key", place, reason))
}

fn parse_bool(key: &'static str, value: &str, place: Place) -> Result<bool, Error> {
    match value {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err(bad(key, place, format!("{value:?} must be true or false"))),
    }
}

fn parse_tags(value: &str, place: Place) -> Result<Vec<String>, Error> {
    value
        .split(['+', ','])
        .map(str::trim)
        .filter(|tag| !tag.is_empty())
        .map(|tag| {
            let name = tag.strip_prefix("tag:").unwrap_or(tag);
            // As Tailscale's tailcfg.CheckTag has it.
            let fine = name.starts_with(|c: char| c.is_ascii_alphabetic())
                && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
            if fine {
                Ok(format!("tag:{name}"))
            } else {
                Err(bad(
                    "tags",
                    place,
                    format!("{tag:?} is no tag: a letter, then letters, digits and hyphens; several are joined by +"),
                ))
            }
        })
        .collect()
}

fn parse_routes(value: &str, place: Place) -> Result<Vec<IpNet>, Error> {
    let bad = |reason| Err(bad("advertise-routes", place, reason));
    let routes = value.split(['+', ',']).map(str::trim);
    let routes = routes.filter(|route| !route.is_empty()).map(|route| {
        match (route.parse::<IpNet>(), route.parse::<IpAddr>()) {
            (Ok(net), _) if net.prefix_len() == 0 => bad(format!(
                "{route} is everything: set advertise-exit-node=true instead"
            )),
            (Ok(net), _) if net.trunc() != net => bad(format!(
                "{route} has bits set beyond its prefix: do you mean {}?",
                net.trunc()
            )),
            (Ok(net), _) => Ok(net),
            (_, Ok(address)) => bad(format!(
                "{route} has no prefix length: for this one address write {}",
                IpNet::from(address)
            )),
            _ => bad(format!(
                "{route:?} is no network: write 10.0.0.0/24 or fd00:1::/64; several are joined by +"
            )),
        }
    });
    routes.collect()
}

/// An address, or a MagicDNS name or the first label of one.
fn parse_exit_node(value: &str, place: Place) -> Result<ExitNode, Error> {
    if let Ok(address) = value.parse() {
        return Ok(ExitNode::Address(address));
    }
    let name = value.trim_end_matches('.').to_ascii_lowercase();
    let is_label = |label: &str| dns_label(label).as_deref() == Some(label);
    if name.split('.').all(is_label) {
        Ok(ExitNode::Name(name))
    } else {
        Err(bad(
            "exit-node",
            place,
            format!("{value:?} is neither the name of a node nor a tailnet address"),
        ))
    }
}

fn option_text(value: &toml::Value) -> Option<String> {
    match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Boolean(flag) => Some(flag.to_string()),
        toml::Value::Array(texts) => {
            let texts: Option<Vec<&str>> = texts.iter().map(toml::Value::as_str).collect();
            Some(texts?.join("+"))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pairs(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs
            .iter()
            .map(|(k, v)| (k.to_string(), v.to_string()))
            .collect()
    }

    #[test]
    fn all_of_them_on_a_network() {
        let options = Options::of_network(&pairs(&[
            ("hostname", "Web_1"),
            ("login-server", "https://headscale.example.com"),
            ("auth-key", "file:/etc/tailnode/auth.key"),
            ("ephemeral", "true"),
            ("tags", "tag:web+prod"),
            ("accept-routes", "true"),
            ("advertise-routes", "10.0.0.0/24+fd00:1::/64, 10.1.0.7/32"),
            ("advertise-exit-node", "false"),
            ("exit-node", "Gw.example.ts.net."),
            ("exit-node-allow-lan-access", "true"),
        ]))
        .unwrap();
        assert_eq!(
            options,
            Options {
                hostname: Some("web-1".into()),
                login_server: Some("https://headscale.example.com".parse().unwrap()),
                auth_key: Some(KeySource::File("/etc/tailnode/auth.key".into())),
                require_login: None,
                ephemeral: Some(true),
                tags: Some(vec!["tag:web".into(), "tag:prod".into()]),
                accept_routes: Some(true),
                advertise_routes: Some(vec![
                    "10.0.0.0/24".parse().unwrap(),
                    "fd00:1::/64".parse().unwrap(),
                    "10.1.0.7/32".parse().unwrap(),
                ]),
                advertise_exit_node: Some(false),
                exit_node: Some(ExitNode::Name("gw.example.ts.net".into())),
                exit_node_allow_lan_access: Some(true),
            }
        );
        assert_eq!(options.exit(), Exit::BesideLan);
    }

    #[test]
    fn what_is_wrong_is_said_with_what_is_right() {
        let network = |key: &str, value: &str| {
            Options::of_network(&pairs(&[(key, value)]))
                .unwrap_err()
                .to_string()
        };
        for (error, words) in [
            (
                network("hostnmae", "a"),
                "unknown option `hostnmae` on the network: did you mean `hostname`?",
            ),
            (network("auth_key", "a"), "did you mean `auth-key`?"),
            (network("Tags", "a"), "did you mean `tags`?"),
            (
                network("colour", "a"),
                "there are hostname, login-server, auth-key, require-login, ephemeral, tags, ",
            ),
            (network("accept-routes", "yes"), "must be true or false"),
            (
                network("advertise-routes", "10.0.0.0/24+10.0.1.1/24"),
                "10.0.1.1/24 has bits set beyond its prefix: do you mean 10.0.1.0/24?",
            ),
            (network("advertise-routes", "fd00::5"), "write fd00::5/128"),
            (
                network("advertise-routes", "0.0.0.0/0"),
                "set advertise-exit-node=true",
            ),
            (network("advertise-routes", "lan"), "is no network"),
            (network("exit-node", "a b"), "neither the name of a node"),
            (network("hostname", "…"), "no letter or digit"),
            (
                network("login-server", "headscale"),
                "it should look like https://",
            ),
            (
                network("login-server", "ftp://h"),
                "must begin with https://",
            ),
            (
                network("login-server", "https://u:p@h"),
                "must not hold a user",
            ),
            (network("ephemeral", "yes"), "must be true or false"),
            (network("tags", "tag:9"), "is no tag"),
            (
                network("auth-key", "file:auth.key"),
                "comes an absolute path",
            ),
        ] {
            assert!(error.contains(words), "{error:?} does not say {words:?}");
        }
    }

    #[test]
    fn an_exit_uses_no_other() {
        let of = |list: &[(&str, &str)]| Options::of_network(&pairs(list));
        let both = of(&[("exit-node", "gw"), ("advertise-exit-node", "true")]);
        assert!(matches!(both, Err(Error::BothExits)));
        let merged = of(&[("exit-node", "gw")])
            .unwrap()
            .over(of(&[("advertise-exit-node", "true")]).unwrap());
        assert!(matches!(merged.routes(), Err(Error::BothExits)));
        let lan = of(&[("exit-node-allow-lan-access", "true")]).unwrap();
        assert_eq!(lan.exit(), Exit::No);
    }

    #[test]
    fn an_inline_key_is_refused_and_not_repeated() {
        for parse in [Options::of_network, Options::of_labels] {
            let error = parse(&pairs(&[
                ("auth-key", "tskey-auth-abc"),
                ("tailscale.auth-key", "tskey-auth-abc"),
            ]))
            .unwrap_err();
            assert!(!format!("{error} {error:?}").contains("abc"), "{error}");
        }
    }

    #[test]
    fn a_label_sets_the_name_and_nothing_else() {
        let labels = |list: &[(&str, &str)]| Options::of_labels(&pairs(list));
        let name = |list| labels(list).unwrap().hostname;
        assert_eq!(name(&[("tailscale.hostname", "web")]), Some("web".into()));
        assert_eq!(
            name(&[("tailscale.com/hostname", "web")]),
            Some("web".into())
        );
        assert_eq!(
            name(&[
                ("tailscale.com/hostname", "theirs"),
                ("tailscale.hostname", "ours")
            ]),
            Some("ours".into())
        );
        assert_eq!(
            name(&[
                ("tailscale.com/expose", "true"),
                ("hostname", "x"),
                ("maintainer", "y")
            ]),
            None
        );
        for key in [
            "tailscale.auth-key",
            "tailscale.login-server",
            "tailscale.tags",
            "tailscale.exit-node",
            "tailscale.hostnam",
        ] {
            assert!(labels(&[(key, "file:/etc/shadow")]).is_err(), "{key}");
        }
    }

    #[test]
    fn a_container_cannot_choose_the_tailnet() {
        for key in ["auth-key", "login-server"] {
            let error = Options::of_container(&pairs(&[(key, "file:/x")]))
                .unwrap_err()
                .to_string();
            assert!(error.contains("it belongs to the network"), "{error}");
        }
    }

    #[test]
    fn the_higher_one_wins() {
        let of = |list: &[(&str, &str)]| Options::of_network(&pairs(list)).unwrap();
        let merged = of(&[("hostname", "a")])
            .over(of(&[("hostname", "b"), ("tags", "x")]))
            .over(of(&[("tags", "y"), ("ephemeral", "true")]));
        assert_eq!(
            merged,
            of(&[("hostname", "a"), ("tags", "x"), ("ephemeral", "true")])
        );
    }

    #[test]
    fn the_file_speaks_the_same_words() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.toml");
        let read = |text: &str| {
            fs::write(&path, text).unwrap();
            Options::of_file(&path)
        };
        assert_eq!(
            Options::of_file(&directory.path().join("none")).unwrap(),
            Options::default()
        );
        assert_eq!(read("# nothing\n").unwrap(), Options::default());
        let options = read(
            "login-server = 'http://10.0.0.1:8080'\nephemeral = true\ntags = ['web', 'tag:b']\n",
        )
        .unwrap();
        assert_eq!(options.ephemeral, Some(true));
        assert_eq!(options.tags, Some(vec!["tag:web".into(), "tag:b".into()]));
        for (text, words) in [
            ("hostname = 'web'", "every container's"),
            ("login_server = 'https://h'", "did you mean `login-server`?"),
            ("ephemeral = 1", "must be a text, true, false or a list"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(
                error.contains(words) && error.contains("config.toml"),
                "{error}"
            );
        }
        let error = read("# a\n\nauth-key = tskey-auth-abc").unwrap_err();
        assert!(!format!("{error} {error:?}").contains("abc"), "{error:?}");
        assert!(error.to_string().contains("line 3"), "{error}");
    }

    #[test]
    fn names_become_dns_labels() {
        for (name, label) in [
            ("web", Some("web")),
            ("My_App.1", Some("my-app-1")),
            ("_x-", Some("x")),
            ("...", None),
            ("", None),
        ] {
            assert_eq!(dns_label(name).as_deref(), label, "{name}");
        }
    }

    proptest! {
        #[test]
        fn a_label_is_always_a_label(name: String) {
            if let Some(label) = dns_label(&name) {
                prop_assert!((1..=MAX_LABEL).contains(&label.len()));
                prop_assert!(label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'));
                prop_assert!(!label.starts_with('-') && !label.ends_with('-'));
                let again = dns_label(&label);
                prop_assert_eq!(again, Some(label));
            }
        }

        #[test]
        fn no_pair_panics(key: String, value: String) {
            let one = pairs(&[(&key, &value)]);
            let _ = (Options::of_network(&one), Options::of_container(&one), Options::of_labels(&one));
        }
    }
}
