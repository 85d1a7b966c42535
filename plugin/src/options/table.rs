//! Every option there is. The parser, `tailnode options`, the manual page, the README's table and
//! the tests of all surfaces are made of this table.

use super::{Options, Surface, values};

/// One option.
pub struct Entry {
    /// Its name, which is that of a flag of `tailscale up` where there is one.
    pub key: &'static str,
    /// The form of its values.
    pub value: Value,
    /// What it does.
    pub help: &'static str,
    /// What holds where nobody sets it, in words.
    pub default: &'static str,
    /// Where it may be set.
    pub surfaces: &'static [Surface],
    /// Where it belongs instead, for who sets it elsewhere.
    pub elsewhere: &'static str,
    /// What Tailscale's container image calls it in its environment.
    pub variables: &'static [&'static str],
    /// Other flags of `tailscale up` that mean it.
    pub flags: &'static [&'static str],
    /// Two good values that differ.
    pub examples: [&'static str; 2],
    /// Reads a value. An error says what is wrong and what is accepted, and never repeats a secret.
    pub(super) read: fn(&mut Options, &str) -> Result<(), String>,
}

/// The form of an option's values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// `true` or `false`.
    Flag,
    /// One word, called so in the manual.
    Word(&'static str),
    /// Words joined by `+`.
    List(&'static str),
}

impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Value::Flag => write!(f, "true|false"),
            Value::Word(word) => write!(f, "{word}"),
            Value::List(word) => write!(f, "{word}[+{word}…]"),
        }
    }
}

const EVERYWHERE: &[Surface] = &[
    Surface::File,
    Surface::Network,
    Surface::Label,
    Surface::Endpoint,
];
const NOT_IN_THE_FILE: &[Surface] = &[Surface::Network, Surface::Label, Surface::Endpoint];
/// What a container must not decide, nor the image that it is made of.
const OWNERS: &[Surface] = &[Surface::File, Surface::Network];

/// All options, in the order in which they are told.
pub const TABLE: &[Entry] = &[
    Entry {
        key: "hostname",
        value: Value::Word("NAME"),
        help: "the node's name on the tailnet",
        default: "the container's name",
        surfaces: NOT_IN_THE_FILE,
        elsewhere: "it would be every container's; set it on one: `--network NAME:hostname=web`",
        variables: &["TS_HOSTNAME"],
        flags: &[],
        examples: ["web", "shop"],
        read: |options, value| {
            options.hostname = Some(values::hostname(value)?);
            Ok(())
        },
    },
    Entry {
        key: "login-server",
        value: Value::Word("URL"),
        help: "the control server",
        default: "Tailscale's",
        surfaces: OWNERS,
        elsewhere: "it belongs to the network: `network create -d tailscale -o login-server=URL`, \
                    or to /etc/tailnode/config.toml",
        variables: &[],
        flags: &[],
        examples: ["https://headscale.example.com", "http://192.0.2.10:8080"],
        read: |options, value| {
            options.login_server = Some(values::url(value)?);
            Ok(())
        },
    },
    Entry {
        key: "auth-key",
        value: Value::Word("WHERE"),
        help: "where the key is that new nodes join with: file:/PATH, credential:NAME (of \
               systemd's) or secret:NAME (of Podman's)",
        default: "that of tailnode login NETWORK",
        surfaces: OWNERS,
        elsewhere: "it belongs to the network, and never inline, where `inspect` shows it: give \
                    the key to `tailnode login NETWORK`, which asks for it, or put it into a file \
                    with `install -m 600 /dev/stdin /etc/tailnode/auth.key`, then \
                    `network create -d tailscale -o auth-key=file:/etc/tailnode/auth.key`, or say \
                    so in /etc/tailnode/config.toml",
        variables: &["TS_AUTHKEY", "TS_AUTH_KEY", "TS_CLIENT_SECRET"],
        flags: &["authkey", "client-secret"],
        examples: ["file:/etc/tailnode/auth.key", "credential:tailnet"],
        read: |options, value| {
            options.auth_key = Some(values::auth_key(value)?);
            Ok(())
        },
    },
    Entry {
        key: "require-login",
        value: Value::Flag,
        help: "a container does not start before its node was let in; else it starts, and waits \
               for the tailnet",
        default: "false",
        surfaces: EVERYWHERE,
        elsewhere: "",
        variables: &[],
        flags: &[],
        examples: ["true", "false"],
        read: |options, value| {
            options.require_login = values::flag(value)?;
            Ok(())
        },
    },
    Entry {
        key: "ephemeral",
        value: Value::Flag,
        help: "the tailnet forgets the node when the container stops",
        default: "false",
        surfaces: EVERYWHERE,
        elsewhere: "",
        variables: &[],
        flags: &[],
        examples: ["true", "false"],
        read: |options, value| {
            options.ephemeral = values::flag(value)?;
            Ok(())
        },
    },
    Entry {
        key: "tags",
        value: Value::List("TAG"),
        help: "tags to ask for",
        default: "those of the auth key",
        surfaces: EVERYWHERE,
        elsewhere: "",
        variables: &[],
        flags: &["advertise-tags"],
        examples: ["tag:web+tag:prod", "tag:db"],
        read: |options, value| {
            options.tags = values::tags(value)?;
            Ok(())
        },
    },
    Entry {
        key: "accept-dns",
        value: Value::Flag,
        help: "names are looked up in the tailnet; else the container's DNS stays as the engine made it",
        default: "true",
        surfaces: EVERYWHERE,
        elsewhere: "",
        variables: &["TS_ACCEPT_DNS"],
        flags: &[],
        examples: ["true", "false"],
        read: |options, value| {
            options.accept_dns = Some(values::flag(value)?);
            Ok(())
        },
    },
    Entry {
        key: "accept-routes",
        value: Value::Flag,
        help: "reach the subnets that other nodes route",
        default: "false",
        surfaces: EVERYWHERE,
        elsewhere: "",
        variables: &[],
        flags: &[],
        examples: ["true", "false"],
        read: |options, value| {
            options.accept_routes = values::flag(value)?;
            Ok(())
        },
    },
    Entry {
        key: "advertise-routes",
        value: Value::List("CIDR"),
        help: "route these networks, which the container is on or reaches, for the tailnet",
        default: "none",
        surfaces: EVERYWHERE,
        elsewhere: "",
        variables: &["TS_ROUTES"],
        flags: &[],
        examples: ["10.0.0.0/24+fd00:1::/64", "10.0.1.0/24"],
        read: |options, value| {
            options.advertise_routes = values::routes(value)?;
            Ok(())
        },
    },
    Entry {
        key: "advertise-exit-node",
        value: Value::Flag,
        help: "be an exit to the Internet for the tailnet",
        default: "false",
        surfaces: EVERYWHERE,
        elsewhere: "",
        variables: &[],
        flags: &[],
        examples: ["true", "false"],
        read: |options, value| {
            options.advertise_exit_node = values::flag(value)?;
            Ok(())
        },
    },
    Entry {
        key: "exit-node",
        value: Value::Word("NODE"),
        help: "everything that the container sends leaves by this node, a name or an address; \
               empty: by none",
        default: "none",
        surfaces: EVERYWHERE,
        elsewhere: "",
        variables: &[],
        flags: &[],
        examples: ["gw", "100.64.0.9"],
        read: |options, value| {
            options.exit_node = values::exit_node(value)?;
            Ok(())
        },
    },
    Entry {
        key: "exit-node-allow-lan-access",
        value: Value::Flag,
        help: "and yet it reaches the networks that it is on",
        default: "false",
        surfaces: EVERYWHERE,
        elsewhere: "",
        variables: &[],
        flags: &[],
        examples: ["true", "false"],
        read: |options, value| {
            options.exit_node_allow_lan_access = values::flag(value)?;
            Ok(())
        },
    },
    Entry {
        key: "lock",
        value: Value::List("OPTION"),
        help: "what is set above this place cannot change these options",
        default: "none",
        surfaces: OWNERS,
        elsewhere: "only a network, or /etc/tailnode/config.toml, can lock options",
        variables: &[],
        flags: &[],
        examples: ["tags+exit-node", "hostname"],
        read: |_, value| values::keys(value).map(|_| ()),
    },
];

/// The option of this name.
pub(super) fn find(key: &str) -> Option<&'static Entry> {
    TABLE.iter().find(|entry| entry.key == key)
}

/// What Tailscale can do and tailnode cannot, by the words that ask for it: options, variables of
/// its container image, flags of `tailscale up`.
const MISSING: &[(&str, &str)] = &[
    ("ssh", "run Tailscale SSH"),
    ("serve", "run Tailscale Serve"),
    ("funnel", "run Tailscale Funnel"),
    ("TS_SERVE_CONFIG", "run Tailscale Serve"),
    ("TS_DEST_IP", "forward a node's traffic to another address"),
    (
        "TS_EXPERIMENTAL_DEST_DNS_NAME",
        "forward a node's traffic to another address",
    ),
    (
        "TS_TAILNET_TARGET_IP",
        "forward traffic to a node of the tailnet",
    ),
    (
        "TS_TAILNET_TARGET_FQDN",
        "forward traffic to a node of the tailnet",
    ),
    ("TS_CLIENT_ID", "exchange identity tokens for auth keys"),
    ("client-id", "exchange identity tokens for auth keys"),
    ("id-token", "exchange identity tokens for auth keys"),
    ("TS_ID_TOKEN", "exchange identity tokens for auth keys"),
    (
        "shields-up",
        "refuse all that comes in (the tailnet's policy can)",
    ),
    ("advertise-connector", "be an app connector"),
    ("report-posture", "report the device's posture"),
    ("snat-subnet-routes", "route subnets without masquerading"),
];

/// What `key` asks for, if that is what tailnode does not do.
pub(super) fn missing(key: &str) -> Option<&'static str> {
    let first = key.split_once('.').map_or(key, |(first, _)| first);
    let mut missing = MISSING.iter();
    missing.find_map(|(word, what)| (*word == first).then_some(*what))
}

/// Flags of `tailscale up` that say nothing to a container's own node, and whether a value follows.
pub(super) const NEEDLESS_FLAGS: &[(&str, bool)] = &[
    ("accept-risk", true),
    ("force-reauth", false),
    ("host-routes", false),
    ("json", false),
    ("netfilter-mode", true),
    ("nickname", true),
    ("operator", true),
    ("qr", false),
    ("qr-format", true),
    ("reset", false),
    ("stateful-filtering", false),
    ("timeout", true),
];

/// The option that is nearest to a word, or all there are, as advice.
pub(super) fn nearest(word: &str) -> String {
    let word = word.to_ascii_lowercase().replace('_', "-");
    let names = TABLE.iter().flat_map(|entry| {
        let flags = entry.flags.iter().map(|flag| (*flag, entry.key));
        flags.chain([(entry.key, entry.key)])
    });
    let (distance, key) = names
        .map(|(name, key)| (strsim::damerau_levenshtein(&word, name), key))
        .min()
        .unwrap_or((usize::MAX, ""));
    if distance <= 3 {
        format!("did you mean `{key}`?")
    } else {
        let keys: Vec<_> = TABLE.iter().map(|entry| entry.key).collect();
        format!("there are {}", keys.join(", "))
    }
}
