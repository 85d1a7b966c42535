//! What the settings of Tailscale's own container image (cmd/containerboot/settings.go) ask for: what tailnode has an
//! option for in its words, and of the rest what a person must know.

use serde_json::Value;
use tailnode_plugin::options::{Surface, TABLE, Word, of_variable};

/// The environment of a sidecar: names, and values where there are any. Those with `${…}` are as they stand.
pub type Environment<'a> = [(&'a str, Option<&'a str>)];

/// The UDP port that people give tailscaled, to publish it.
const USUAL_PORT: &str = "41641";

/// What a sidecar asks for.
#[derive(Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The node's name, if the environment says it.
    pub hostname: Option<String>,
    /// Keys and values for the container.
    pub options: Vec<(&'static str, String)>,
    /// Which control server, where it is not Tailscale's.
    pub login_server: Option<String>,
    /// tailscaled's own UDP port.
    pub port: String,
    /// Where in the container it kept its identity.
    pub state: Option<String>,
    /// The file in the container that says what it serves.
    pub serve_config: Option<String>,
    /// Whether it is of use to others alone: a router, an exit or a proxy.
    pub routes: bool,
    /// Keys that stood in the file itself, which nothing may repeat.
    pub secrets: Vec<String>,
    /// What has no equivalent, or is given otherwise. No value of a secret is in it.
    pub remarks: Vec<String>,
}

/// Whether an environment is that of a sidecar, whatever its image is called.
pub fn is_environment(environment: &Environment) -> bool {
    environment.iter().any(|(name, _)| {
        [
            "TS_AUTHKEY",
            "TS_AUTH_KEY",
            "TS_STATE_DIR",
            "TS_USERSPACE",
            "TS_EXTRA_ARGS",
        ]
        .contains(name)
    })
}

/// Whether an image is Tailscale's: `tailscale/tailscale`, from whatever registry, in whatever version.
pub fn is_image(image: &str) -> bool {
    // In `${IMAGE:-tailscale/tailscale:latest}` too.
    image
        .match_indices("tailscale/tailscale")
        .any(|(at, name)| {
            let before = &image[..at];
            let after = &image[at + name.len()..];
            (before.is_empty() || before.ends_with(['/', '-', '=']))
                && (after.is_empty() || after.starts_with([':', '@', '}']))
        })
}

/// Reads a sidecar's environment.
pub fn read(environment: &Environment) -> Wanted {
    let mut wanted = Wanted {
        hostname: None,
        options: Vec::new(),
        login_server: None,
        port: USUAL_PORT.into(),
        state: None,
        serve_config: None,
        routes: false,
        secrets: Vec::new(),
        remarks: Vec::new(),
    };
    let value_of = |wanted: &str| {
        let (name, value) = environment.iter().find(|(name, _)| *name == wanted)?;
        Some(match value {
            Some(value) => (*value).to_owned(),
            // Compose takes it from its own environment.
            None => format!("${{{name}}}"),
        })
    };
    // As containerboot has it: without a directory it keeps nothing, and takes userspace mode.
    let mut in_memory = value_of("TS_STATE_DIR").is_none_or(|directory| directory.is_empty());
    let mut userspace = value_of("TS_USERSPACE").is_none_or(|value| go_bool(&value) != Some(false));
    for (name, _) in environment {
        let value = value_of(name).unwrap_or_default();
        if value.is_empty() {
            continue;
        }
        match *name {
            "TS_CLIENT_SECRET" => wanted.auth_key(name, &value),
            "TS_CLIENT_ID" | "TS_ID_TOKEN" | "TS_AUDIENCE" => wanted.say(format!(
                "{name}: what a node joins with is kept by tailnoded, for the network: `tailnode login NETWORK`"
            )),
            "TS_STATE_DIR" => wanted.state = Some(value),
            "TS_EXTRA_ARGS" if value.trim_start().starts_with('$') => wanted.say(format!(
                "TS_EXTRA_ARGS: its flags are in {value}, which is not read here: say them as labels, for example \
                 tailscale.tags"
            )),
            "TS_EXTRA_ARGS" => {
                for word in of_variable(name, &value) {
                    let from = match word.key.contains(' ') {
                        // It has no name.
                        true => format!("TS_EXTRA_ARGS, {}", word.key),
                        false => format!("TS_EXTRA_ARGS --{}", word.key),
                    };
                    wanted.take(&from, word);
                }
            }
            "TS_TAILSCALED_EXTRA_ARGS" => {
                for (flag, value) in split_flags(&value) {
                    match (flag.as_str(), value.as_deref()) {
                        ("state", Some("mem:")) => in_memory = true,
                        ("tun", Some("userspace-networking")) => userspace = true,
                        ("socks5-server" | "outbound-http-proxy-listen", _) => {
                            wanted.proxy(&format!("TS_TAILSCALED_EXTRA_ARGS --{flag}"));
                        }
                        ("port", Some(port)) => {
                            wanted.port = port.into();
                            wanted.say("TS_TAILSCALED_EXTRA_ARGS --port: each node's UDP port is tailnoded's to choose".into());
                        }
                        ("state" | "statedir" | "socket" | "verbose" | "tun", _) => {}
                        _ => wanted.say(format!("TS_TAILSCALED_EXTRA_ARGS --{flag}: has no equivalent")),
                    }
                }
            }
            "TS_SERVE_CONFIG" => wanted.serve_config = Some(value),
            "TS_SOCKS5_SERVER" | "TS_OUTBOUND_HTTP_PROXY_LISTEN" => wanted.proxy(name),
            "TS_DEST_IP" | "TS_EXPERIMENTAL_DEST_DNS_NAME" | "TS_TAILNET_TARGET_IP" | "TS_TAILNET_TARGET_FQDN" => {
                wanted.routes = true;
                wanted.say(format!(
                    "{name}: nothing is forwarded from one address to another; give the container that is meant \
                     a node of its own, or let it reach the tailnet itself"
                ));
            }
            "TS_ENABLE_HEALTH_CHECK" | "TS_HEALTHCHECK_ADDR_PORT" | "TS_ENABLE_METRICS" => wanted.say(format!(
                "{name}: no address in the container tells how the node is; `tailnode status` does"
            )),
            // A node without a tun device, a socket, a key that is used once: all of it is so anyway.
            "TS_USERSPACE" | "TS_AUTH_ONCE" | "TS_SOCKET" | "TS_LOCAL_ADDR_PORT" | "TS_DEBUG_ADDR_PORT" | "TS_KUBE_SECRET" | "TS_DEBUG_FIREWALL_MODE"
            | "TS_BOOT_TIMEOUT" => {}
            name if name.starts_with("TS_") => match of_variable(name, &value) {
                words if words.is_empty() => wanted.say(format!("{name}: has no equivalent")),
                words => words.into_iter().for_each(|word| wanted.take(name, word)),
            },
            _ => {}
        }
    }
    if in_memory && !wanted.options.iter().any(|(key, _)| *key == "ephemeral") {
        wanted.options.push(("ephemeral", "true".into()));
        wanted.say(
            "it kept its identity in memory, so each start made a new node: it is ephemeral here too; remove \
             tailscale.ephemeral and it stays the same node"
                .into(),
        );
    }
    if userspace {
        wanted.say(
            "it was in userspace mode: peers seemed to be 127.0.0.1. They now come with their own addresses, by \
             tailscale0, so what listens on 127.0.0.1 alone must listen on 0.0.0.0"
                .into(),
        );
    }
    wanted
}

impl Wanted {
    fn say(&mut self, remark: String) {
        if !self.remarks.contains(&remark) {
            self.remarks.push(remark);
        }
    }

    fn set(&mut self, key: &'static str, value: String) {
        if matches!(key, "advertise-routes" | "advertise-exit-node") {
            self.routes = true;
        }
        self.options.retain(|(known, _)| *known != key);
        self.options.push((key, value));
    }

    /// What one of Tailscale's words sets.
    fn take(&mut self, from: &str, Word { key, value }: Word) {
        let entry = TABLE.iter().find(|entry| entry.key == key);
        match (key.as_str(), entry) {
            ("auth-key", _) => self.auth_key(from, &value),
            // The emptiest value is their way to say no.
            (_, Some(entry)) if value.is_empty() || value == entry.default => {}
            ("hostname", _) => self.hostname = Some(value),
            ("login-server", _) => self.login_server = Some(value),
            ("exit-node", _) if value.starts_with("auto:") => self.say(format!(
                "{from}={value}: an exit is named here: tailscale.exit-node=NAME"
            )),
            (_, Some(entry)) if entry.surfaces.contains(&Surface::Label) => self.set(entry.key, value),
            ("ssh", _) => self.say(format!(
                "{from}: there is no SSH server; `podman exec` or `docker exec` leads in"
            )),
            ("shields-up", _) => self.say(format!(
                "{from}: has no equivalent; the tailnet's policy says who may connect"
            )),
            ("snat-subnet-routes", _) => self.say(format!(
                "{from}=false: has no equivalent; who is behind the router sees the container's address"
            )),
            _ => self.say(format!("{from}: has no equivalent")),
        }
    }

    fn auth_key(&mut self, from: &str, value: &str) {
        // Not the `?` of `${KEY:?say it}`.
        let behind = value.rfind('}').map_or(0, |at| at + 1);
        let (key, parameters) = match value[behind..].split_once('?') {
            Some((_, parameters)) => (&value[..value.len() - parameters.len() - 1], parameters),
            None => (value, ""),
        };
        for parameter in parameters.split('&').filter(|text| !text.is_empty()) {
            match parameter.split_once('=') {
                Some(("ephemeral", value)) => {
                    // A client's nodes are ephemeral unless this says otherwise: it must be said here as well.
                    self.options.retain(|(known, _)| *known != "ephemeral");
                    match go_bool(value) {
                        Some(value) => self.options.push(("ephemeral", value.to_string())),
                        None => {
                            self.say(format!("{from}: its `ephemeral` is neither true nor false"))
                        }
                    }
                }
                _ => self.say(format!(
                    "{from}: of its parameters only `ephemeral` is taken over"
                )),
            }
        }
        let what = if key.starts_with("tskey-client-") {
            "client secret"
        } else {
            "auth key"
        };
        let was = if key.starts_with("file:") {
            "came from a file in the container"
        } else if key.contains('$') {
            "came from the environment"
        } else {
            // Shorter ones only stand for a key, and may be words that the file has elsewhere.
            if key.len() >= 16 {
                self.secrets.push(key.to_owned());
            }
            "stood in the file itself: revoke it if others could read that"
        };
        self.say(format!(
            "{from}: the {what} {was}. It is tailnoded's to keep, for the whole network: `tailnode login NETWORK` \
             asks for it"
        ));
    }

    fn proxy(&mut self, from: &str) {
        self.say(format!(
            "{from}: there is no proxy: the container reaches the tailnet itself, so remove ALL_PROXY, HTTP_PROXY and \
             the like from what used it, and give other containers that did the network too"
        ));
    }
}

/// What a serve configuration leads to, such as `http://127.0.0.1:8096`, and whether the Internet may come in.
/// `None` if it is not readable.
pub fn served(config: &str) -> Option<(Vec<String>, bool)> {
    fn walk(value: &Value, targets: &mut Vec<String>) {
        match value {
            Value::Object(fields) => fields.iter().for_each(|(name, value)| match value {
                Value::String(target) if matches!(name.as_str(), "Proxy" | "TCPForward") => {
                    if !targets.contains(target) {
                        targets.push(target.clone());
                    }
                }
                value => walk(value, targets),
            }),
            Value::Array(values) => values.iter().for_each(|value| walk(value, targets)),
            _ => {}
        }
    }
    let config: Value = serde_json::from_str(config).ok()?;
    let mut targets = Vec::new();
    walk(&config, &mut targets);
    let funnel = config["AllowFunnel"].as_object();
    let funnel = funnel.is_some_and(|hosts| hosts.values().any(|on| *on == Value::Bool(true)));
    Some((targets, funnel))
}

/// Flags as Go's package flag reads them: one dash or two, the value after `=` or as the next word.
fn split_flags(arguments: &str) -> Vec<(String, Option<String>)> {
    let mut flags: Vec<(String, Option<String>)> = Vec::new();
    for word in arguments.split_whitespace() {
        match word.strip_prefix("--").or(word.strip_prefix('-')) {
            Some(flag) if !flag.is_empty() => match flag.split_once('=') {
                Some((flag, value)) => flags.push((flag.into(), Some(value.into()))),
                None => flags.push((flag.into(), None)),
            },
            _ => {
                if let Some((_, value @ None)) = flags.last_mut() {
                    *value = Some(word.into());
                }
            }
        }
    }
    flags
}

/// As Go's strconv.ParseBool.
fn go_bool(value: &str) -> Option<bool> {
    match value {
        "1" | "t" | "T" | "TRUE" | "true" | "True" => Some(true),
        "0" | "f" | "F" | "FALSE" | "false" | "False" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(environment: &Environment) -> Wanted {
        let mut all = environment.to_vec();
        all.extend([
            ("TS_STATE_DIR", Some("/state")),
            ("TS_USERSPACE", Some("false")),
        ]);
        read(&all)
    }

    #[test]
    fn flags_become_options_one_by_one() {
        let wanted = wanted(&[
            (
                "TS_EXTRA_ARGS",
                Some(
                    "--advertise-tags=tag:web,tag:prod -accept-routes --exit-node gw --ssh --reset --advertise-exit-node=0",
                ),
            ),
            ("TS_ROUTES", Some("10.0.0.0/24")),
            ("TS_ACCEPT_DNS", Some("true")),
        ]);
        assert_eq!(
            wanted.options,
            [
                ("tags", "tag:web,tag:prod".to_owned()),
                ("accept-routes", "true".into()),
                ("exit-node", "gw".into()),
                ("advertise-routes", "10.0.0.0/24".into()),
            ]
        );
        assert_eq!(wanted.remarks.len(), 1, "{:?}", wanted.remarks);
        assert!(wanted.remarks[0].starts_with("TS_EXTRA_ARGS --ssh: "));
    }

    #[test]
    fn a_key_is_never_repeated_wherever_it_stands() {
        let secret = "k1SECRET-CNTRL";
        for environment in [
            ("TS_AUTHKEY", secret.to_owned()),
            (
                "TS_AUTH_KEY",
                format!("{secret}?ephemeral=true&preauthorized={secret}"),
            ),
            (
                "TS_EXTRA_ARGS",
                format!("--auth-key={secret} --unknown={secret}"),
            ),
            ("TS_EXTRA_ARGS", format!("--authkey {secret}")),
            (
                "TS_EXTRA_ARGS",
                format!("--client-secret {secret} {secret}"),
            ),
            ("TS_AUTHKEY", format!("$KEY?ephemeral={secret}")),
            ("TS_CLIENT_SECRET", secret.into()),
            ("TS_SOMETHING", secret.into()),
            ("TS_TAILSCALED_EXTRA_ARGS", format!("--what {secret}")),
        ] {
            let wanted = wanted(&[(environment.0, Some(&environment.1))]);
            assert!(!wanted.remarks.is_empty());
            let said = format!("{:?}{:?}", wanted.options, wanted.remarks);
            assert!(!said.contains("SECRET-CNTRL"), "{said}");
        }
    }

    #[test]
    fn what_is_kept_in_memory_is_ephemeral() {
        assert!(read(&[]).options.contains(&("ephemeral", "true".into())));
        let of_client = wanted(&[("TS_AUTHKEY", Some("${KEY:?say it}?ephemeral=false"))]);
        assert_eq!(of_client.options, [("ephemeral", "false".to_owned())]);
        assert_eq!(of_client.remarks.len(), 1, "{:?}", of_client.remarks);
        let flagged = wanted(&[("TS_TAILSCALED_EXTRA_ARGS", Some("--state=mem:"))]);
        assert_eq!(flagged.options, [("ephemeral", "true".to_owned())]);
        assert_eq!(wanted(&[]).options, []);
    }

    #[test]
    fn images_of_tailscale() {
        for image in [
            "tailscale/tailscale",
            "docker.io/tailscale/tailscale:v1.80",
            "ghcr.io/tailscale/tailscale@sha256:00",
            "${IMAGE:-tailscale/tailscale:latest}",
        ] {
            assert!(is_image(image), "{image}");
        }
        for image in [
            "nginx",
            "mytailscale/tailscale",
            "tailscale/tailscale-exporter",
            "tailscale/golink:main",
        ] {
            assert!(!is_image(image), "{image}");
        }
    }

    #[test]
    fn what_is_served_is_found() {
        let config = r#"{"Web": {"${TS_CERT_DOMAIN}:443": {"Handlers": {"/": {"Proxy": "http://127.0.0.1:80"}}}},
            "AllowFunnel": {"${TS_CERT_DOMAIN}:443": true}}"#;
        assert_eq!(
            served(config),
            Some((vec!["http://127.0.0.1:80".into()], true))
        );
        assert_eq!(served("{"), None);
    }
}
