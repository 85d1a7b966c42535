//! The options of a node: one vocabulary, named after the flags of `tailscale up`, on whatever
//! surface it is given.

mod layer;
pub mod manual;
mod table;
mod values;
mod words;

use ipnet::IpNet;
pub use layer::{Layer, Marks, Settled, Surface, TUN_ANNOTATION, Told, settle};
pub use table::{Entry, TABLE, Value};
use tailnode_node::{ExitNode, RoutePreferences};
use tailnode_tun::Exit;
use url::Url;
pub use words::{Word, of_variable};

use crate::{Error, secrets::KeySource};

/// Tailscale's own control server (ipn/prefs.go).
const DEFAULT_LOGIN_SERVER: &str = "https://controlplane.tailscale.com";

/// Longest DNS label, RFC 1035 section 2.3.4.
const MAX_LABEL: usize = 63;

/// What holds for one container's node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The name to ask for, a DNS label.
    pub hostname: Option<String>,
    /// The control server.
    pub login_server: Option<Url>,
    /// Where the key to join with is.
    pub auth_key: Option<KeySource>,
    /// Whether a container does not start before its node was let in.
    pub require_login: bool,
    /// Whether the tailnet forgets the node when the container stops.
    pub ephemeral: bool,
    /// Tags to ask for, `tag:` included.
    pub tags: Vec<String>,
    /// Whether the container asks the node's resolver.
    pub accept_dns: Option<bool>,
    /// Whether to take the subnets that peers route.
    pub accept_routes: bool,
    /// Subnets to route for the tailnet.
    pub advertise_routes: Vec<IpNet>,
    /// Whether to be an exit for the tailnet.
    pub advertise_exit_node: bool,
    /// The peer by which everything leaves.
    pub exit_node: Option<ExitNode>,
    /// Whether the networks that the container is on are still reached without it.
    pub exit_node_allow_lan_access: bool,
}

impl Options {
    /// Which routes the node takes and offers; an error where they contradict each other.
    pub fn routes(&self) -> Result<RoutePreferences, Error> {
        if self.exit_node.is_some() && self.advertise_exit_node {
            return Err(Error::BothExits);
        }
        Ok(RoutePreferences {
            accept: self.accept_routes,
            advertise: self.advertise_routes.clone(),
            advertise_exit: self.advertise_exit_node,
            exit_node: self.exit_node.clone(),
        })
    }

    /// What leaves by the node's device because of its exit.
    pub fn exit(&self) -> Exit {
        match (&self.exit_node, self.exit_node_allow_lan_access) {
            (None, _) => Exit::No,
            (Some(_), true) => Exit::BesideLan,
            (Some(_), false) => Exit::Everything,
        }
    }

    /// Whether the container's names are looked up by the node.
    pub fn accepts_dns(&self) -> bool {
        self.accept_dns.unwrap_or(true)
    }

    /// Where to log in.
    pub fn login_server(&self) -> Result<Url, Error> {
        match &self.login_server {
            Some(url) => Ok(url.clone()),
            None => values::url(DEFAULT_LOGIN_SERVER).map_err(|reason| Error::BadOption {
                key: "login-server",
                place: "by default".into(),
                reason,
            }),
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

#[cfg(test)]
mod tests;
