//! What a node joins with, and the care that it is never seen.

use url::{Host, Url, form_urlencoded};

/// How the secret of an OAuth client begins (feature/oauthkey of Tailscale's Go code).
const CLIENT: &str = "tskey-client-";
/// Tailscale's own API.
const API: &str = "https://api.tailscale.com";

/// Text that must not be seen: its `Debug` shows nothing of it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Takes a secret, without the line end that files have.
    pub fn new(text: impl AsRef<str>) -> Self {
        Self(text.as_ref().trim().to_owned())
    }

    /// The secret itself.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// The text without this secret, where somebody else's words repeat it.
    pub(crate) fn hidden_in(&self, text: &str) -> String {
        if self.0.is_empty() {
            text.to_owned()
        } else {
            text.replace(&self.0, "[redacted]")
        }
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[redacted]")
    }
}

/// What a node joins with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AuthKey {
    /// A key that the control server takes.
    Key(Secret),
    /// A client of Tailscale's API, which makes a key for each node.
    Client(OauthClient),
}

/// A client of Tailscale's API that may make auth keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OauthClient {
    pub(crate) secret: Secret,
    pub(crate) ephemeral: Option<bool>,
    pub(crate) preauthorized: bool,
    /// Where the API is.
    pub(crate) api: Url,
}

/// Why a secret can be nothing to join with. Holds nothing of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadKey {
    /// There is none.
    #[error("there is nothing in it")]
    Empty,
    /// It is something else.
    #[error("there is more than one word in it")]
    Words,
    /// What follows the question mark of a client's secret is not understood.
    #[error(
        "after the OAuth client's secret may come `?` and, joined by `&`, ephemeral=true or false, \
         preauthorized=true or false, and baseURL=URL"
    )]
    Attribute,
    /// The secret would be sent to anybody on the way.
    #[error("the baseURL of an OAuth client must begin with https://")]
    Api,
}

impl AuthKey {
    /// Reads a key, or an OAuth client's secret:
    /// `tskey-client-…[?ephemeral=BOOL&preauthorized=BOOL&baseURL=URL]`, as Tailscale's own client
    /// takes it.
    pub fn parse(text: &str) -> Result<Self, BadKey> {
        let text = text.trim();
        if text.is_empty() {
            return Err(BadKey::Empty);
        }
        if text.contains(char::is_whitespace) {
            return Err(BadKey::Words);
        }
        if !text.starts_with(CLIENT) {
            return Ok(Self::Key(Secret::new(text)));
        }
        let (secret, attributes) = text.split_once('?').unwrap_or((text, ""));
        let (mut ephemeral, mut preauthorized, mut api) = (None, None, None);
        for (name, value) in form_urlencoded::parse(attributes.as_bytes()) {
            match &*name {
                "ephemeral" => ephemeral = ephemeral.or(flag(&value)?),
                "preauthorized" => preauthorized = preauthorized.or(flag(&value)?),
                "baseURL" => {
                    api.get_or_insert(value);
                }
                _ => return Err(BadKey::Attribute),
            }
        }
        let api = api.as_deref().filter(|url| !url.is_empty()).unwrap_or(API);
        let api: Url = api.parse().map_err(|_| BadKey::Api)?;
        // Plain text only to where nobody listens: a stand-in of the API on this very host.
        let fine = match api.scheme() {
            "https" => api.host().is_some(),
            "http" => is_loopback(&api),
            _ => false,
        };
        if !fine {
            return Err(BadKey::Api);
        }
        Ok(Self::Client(OauthClient {
            secret: Secret::new(secret),
            ephemeral,
            preauthorized: preauthorized.unwrap_or(false),
            api,
        }))
    }

    /// Whether its nodes are to be ephemeral, if it says.
    pub fn ephemeral(&self) -> Option<bool> {
        match self {
            Self::Key(_) => None,
            Self::Client(client) => client.ephemeral,
        }
    }

    /// Whether a node can join with it only by tags.
    pub(crate) fn needs_tags(&self) -> bool {
        matches!(self, Self::Client(_))
    }

    pub(crate) fn secret(&self) -> &Secret {
        match self {
            Self::Key(key) => key,
            Self::Client(client) => &client.secret,
        }
    }
}

/// What Go's strconv.ParseBool takes; empty is not said.
fn flag(value: &str) -> Result<Option<bool>, BadKey> {
    match value {
        "" => Ok(None),
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(Some(true)),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(Some(false)),
        _ => Err(BadKey::Attribute),
    }
}

fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        Some(Host::Domain(_)) | None => false,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn client(text: &str) -> Result<OauthClient, BadKey> {
        match AuthKey::parse(text)? {
            AuthKey::Client(client) => Ok(client),
            AuthKey::Key(_) => panic!("a plain key"),
        }
    }

    #[test]
    fn secrets_do_not_print() {
        let secret = Secret::new("tskey-auth-1\n");
        assert_eq!(format!("{secret:?}"), "[redacted]");
        assert_eq!(secret.expose(), "tskey-auth-1");
        assert_eq!(
            secret.hidden_in("no key tskey-auth-1 here"),
            "no key [redacted] here"
        );
        assert_eq!(Secret::new("").hidden_in("words"), "words");
    }

    #[test]
    fn a_clients_secret_says_what_its_keys_are_like() {
        assert_eq!(
            AuthKey::parse("tskey-auth-a?ephemeral=true\n"),
            Ok(AuthKey::Key(Secret::new("tskey-auth-a?ephemeral=true")))
        );
        let plain = client("tskey-client-a\n").unwrap();
        assert_eq!(
            (plain.secret.expose(), plain.ephemeral, plain.preauthorized),
            ("tskey-client-a", None, false)
        );
        assert_eq!(plain.api.as_str(), "https://api.tailscale.com/");
        let full = client(
            "tskey-client-a?ephemeral=0&preauthorized=true&baseURL=https%3A%2F%2Fapi.example.com",
        )
        .unwrap();
        assert_eq!(full.secret.expose(), "tskey-client-a");
        assert_eq!((full.ephemeral, full.preauthorized), (Some(false), true));
        assert_eq!(full.api.as_str(), "https://api.example.com/");
        let unsaid = client("tskey-client-a?ephemeral=&baseURL=").unwrap();
        assert_eq!((unsaid.ephemeral, unsaid.api), (None, plain.api));
        assert!(client("tskey-client-a?baseURL=http://127.0.0.1:8080").is_ok());
    }

    #[test]
    fn what_is_wrong_is_said_without_the_secret() {
        for (text, error) in [
            (" \n", BadKey::Empty),
            ("tskey-auth-abc tskey-auth-def", BadKey::Words),
            ("tskey-client-abc?reusable=true", BadKey::Attribute),
            ("tskey-client-abc?ephemeral=maybe", BadKey::Attribute),
            ("tskey-client-abc?def", BadKey::Attribute),
            ("tskey-client-abc?baseURL=api.example.com", BadKey::Api),
            (
                "tskey-client-abc?baseURL=http://api.example.com",
                BadKey::Api,
            ),
            ("tskey-client-abc?baseURL=http://localhost", BadKey::Api),
        ] {
            assert_eq!(AuthKey::parse(text), Err(error), "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics_or_prints(tail in "[a-z?&=%:/.]{0,40}") {
            let text = format!("tskey-client-QQQQ{tail}");
            let shown = format!("{:?}", AuthKey::parse(&text));
            prop_assert!(!shown.contains("QQQQ"));
        }
    }
}
