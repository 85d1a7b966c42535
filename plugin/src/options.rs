//! The options of a node: one vocabulary, named after the flags of `tailscale up`, on whatever
//! surface it is given.

mod layer;
pub mod manual;
mod table;
mod values;
mod words;

use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use ipnet::IpNet;
pub use layer::{Layer, Marks, Settled, Surface, TUN_ANNOTATION, Told, settle};
pub use table::{Entry, TABLE, Value};
use tailnode_node::{ExitNode, RoutePreferences, Secret};
use tailnode_tun::Exit;
use url::Url;
pub use words::{Word, of_variable};

use crate::Error;

/// Tailscale's own control server (ipn/prefs.go).
const DEFAULT_LOGIN_SERVER: &str = "https://controlplane.tailscale.com";

/// The longest file with an auth key, in bytes. A key has about a hundred.
const MAX_AUTH_KEY_FILE: u64 = 4096;

/// Longest DNS label, RFC 1035 section 2.3.4.
const MAX_LABEL: usize = 63;

/// What holds for one container's node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The name to ask for, a DNS label.
    pub hostname: Option<String>,
    /// The control server.
    pub login_server: Option<Url>,
    /// The file that holds the key to join with.
    pub auth_key: Option<PathBuf>,
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

    /// Reads the auth key's file, if there is one set.
    pub fn read_auth_key(&self) -> Result<Option<Secret>, Error> {
        let Some(path) = &self.auth_key else {
            return Ok(None);
        };
        let failed = |cause| Error::AuthKey {
            path: path.clone(),
            cause,
        };
        let text = read_secret(path).map_err(failed)?;
        match text.trim() {
            "" => Err(failed(io::Error::other("the file is empty"))),
            key if key.contains(char::is_whitespace) => Err(failed(io::Error::other(
                "there is more than one word in the file",
            ))),
            key => Ok(Some(Secret::new(key))),
        }
    }
}

/// Reads a file that only its owner should be able to read. It need not end for this to end.
fn read_secret(path: &Path) -> io::Result<String> {
    let metadata = fs::metadata(path)?;
    // To open a FIFO would wait for its other end.
    if !metadata.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let mode = metadata.permissions().mode();
    if mode & 0o077 != 0 {
        tracing::warn!(
            "the auth key in {0} is open to others than its owner (mode {1:03o}): \
             `chmod 600 {0}`, and revoke the key if somebody may have read it",
            path.display(),
            mode & 0o777
        );
    }
    let mut text = String::new();
    let read = File::open(path)?
        .take(MAX_AUTH_KEY_FILE + 1)
        .read_to_string(&mut text)?;
    if read as u64 > MAX_AUTH_KEY_FILE {
        return Err(io::Error::other("the file is too long to be a key"));
    }
    Ok(text)
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
