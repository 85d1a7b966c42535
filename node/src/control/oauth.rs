//! An auth key for one node, made by an OAuth client of Tailscale's API: first a token for the
//! client's secret, then a key for the token (feature/oauthkey, client/tailscale/keys.go).

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Request, StatusCode, header};
use http_body_util::Full;
use serde::Deserialize;
use serde_json::json;
use tokio::time::timeout;
use url::form_urlencoded;

use super::{Failure, MAX_ANSWER, authority, connect, retry};
use crate::{
    auth_key::{OauthClient, Secret},
    dial,
};

/// How long each of the two questions may take.
const ANSWER: Duration = Duration::from_secs(10);

/// Why there is no key.
#[derive(Debug)]
pub enum NoKey {
    /// The API's no, in words for a person.
    Refused(String),
    /// It may be asked again.
    Away(Failure),
}

/// Makes a one-off key with these tags.
pub async fn mint(
    client: &OauthClient,
    tags: &[String],
    ephemeral: bool,
    tls: &Arc<rustls::ClientConfig>,
) -> Result<Secret, NoKey> {
    let token = ask(client, client.for_token(), tls).await?;
    ask(client, client.for_key(&token, tags, ephemeral), tls).await
}

/// A request to the API.
struct Question {
    path: &'static str,
    token: Option<Secret>,
    content_type: &'static str,
    body: Secret,
    /// The member of the answer that holds the secret asked for.
    field: &'static str,
}

impl OauthClient {
    fn for_token(&self) -> Question {
        let body = form_urlencoded::Serializer::new(String::new())
            .append_pair("grant_type", "client_credentials")
            // The secret names its client; the API passes over this, but it must be there.
            .append_pair("client_id", "tailnode")
            .append_pair("client_secret", self.secret.expose())
            .finish();
        Question {
            path: "/api/v2/oauth/token",
            token: None,
            content_type: "application/x-www-form-urlencoded",
            body: Secret::new(body),
            field: "access_token",
        }
    }

    fn for_key(&self, token: &Secret, tags: &[String], ephemeral: bool) -> Question {
        let body = json!({ "capabilities": { "devices": { "create": {
            "reusable": false,
            "ephemeral": ephemeral,
            "preauthorized": self.preauthorized,
            "tags": tags,
        } } } });
        Question {
            // The tailnet that the client belongs to.
            path: "/api/v2/tailnet/-/keys",
            token: Some(token.clone()),
            content_type: "application/json",
            body: Secret::new(body.to_string()),
            field: "key",
        }
    }

    /// What the API's answer means. Nothing of it is repeated but its message, and of that no
    /// secret.
    fn read(&self, question: &Question, status: StatusCode, body: &[u8]) -> Result<Secret, NoKey> {
        if status.is_success() {
            let answer: Option<serde_json::Value> = serde_json::from_slice(body).ok();
            let secret = answer.as_ref().and_then(|it| it[question.field].as_str());
            return match secret.map(Secret::new) {
                Some(secret) if !secret.expose().is_empty() => Ok(secret),
                _ => Err(NoKey::Refused(format!(
                    "{} gave no key: its answer to {} has no `{}`",
                    self.api, question.path, question.field
                ))),
            };
        }
        #[derive(Default, Deserialize)]
        #[serde(default)]
        struct Words {
            message: String,
            error_description: String,
            error: String,
        }
        let words: Words = serde_json::from_slice(body).unwrap_or_default();
        let words = [words.message, words.error_description, words.error];
        let words = words.into_iter().find(|words| !words.is_empty());
        let mut words: String = words.unwrap_or_default().chars().take(200).collect();
        for secret in question.token.iter().chain([&self.secret]) {
            words = secret.hidden_in(&words);
        }
        let text = format!(
            "{} made no auth key for the OAuth client: {status} {words}",
            self.api
        );
        let again = status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS;
        Err(if again {
            NoKey::Away(retry(text.trim_end()))
        } else {
            NoKey::Refused(format!(
                "{} (is the client there, may it write auth keys, and does it own the tags?)",
                text.trim_end()
            ))
        })
    }
}

async fn ask(
    client: &OauthClient,
    question: Question,
    tls: &Arc<rustls::ClientConfig>,
) -> Result<Secret, NoKey> {
    let exchange = async {
        let base = client.api.path().trim_end_matches('/');
        let mut request = Request::post(format!("{base}{}", question.path))
            .header(header::HOST, authority(&client.api))
            .header(header::ACCEPT, "application/json")
            .header(header::CONTENT_TYPE, question.content_type);
        if let Some(token) = &question.token {
            let value = format!("Bearer {}", token.expose());
            let mut value = HeaderValue::try_from(value)
                .map_err(|_| retry("the API's token cannot be in a header"))?;
            value.set_sensitive(true);
            request = request.header(header::AUTHORIZATION, value);
        }
        let body = Full::new(Bytes::from(question.body.expose().to_owned()));
        let request = request.body(body).map_err(retry)?;
        let (mut http, _) = connect(&client.api, tls.clone()).await?;
        let response = http.ask(request).await?;
        let status = response.status();
        Ok((status, dial::body(response, MAX_ANSWER).await?))
    };
    let late = || retry(format!("no answer in {} s", ANSWER.as_secs()));
    let (status, body) = timeout(ANSWER, exchange)
        .await
        .unwrap_or_else(|_| Err(late()))
        .map_err(|failure: Failure| {
            let words = failure.into_words();
            NoKey::Away(retry(format!(
                "cannot have an auth key made by {}: {words}",
                client.api
            )))
        })?;
    client.read(&question, status, &body)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::auth_key::AuthKey;

    fn client() -> OauthClient {
        let text = "tskey-client-QQQQ-a+b?preauthorized=true&baseURL=https://api.example.com";
        match AuthKey::parse(text).unwrap() {
            AuthKey::Client(client) => client,
            AuthKey::Key(_) => panic!("a plain key"),
        }
    }

    #[test]
    fn a_token_is_asked_for_the_secret_and_a_key_for_the_token() {
        let client = client();
        let question = client.for_token();
        assert_eq!(
            (question.path, question.body.expose()),
            (
                "/api/v2/oauth/token",
                "grant_type=client_credentials&client_id=tailnode&client_secret=tskey-client-QQQQ-a%2Bb"
            )
        );
        let answer = br#"{"access_token":"TTTT","token_type":"Bearer","expires_in":3600}"#;
        let token = client.read(&question, StatusCode::OK, answer).unwrap();
        assert_eq!(token.expose(), "TTTT");

        let question = client.for_key(&token, &["tag:web".into()], true);
        assert_eq!(question.path, "/api/v2/tailnet/-/keys");
        assert_eq!(question.token.as_ref(), Some(&token));
        let body: serde_json::Value = serde_json::from_str(question.body.expose()).unwrap();
        assert_eq!(
            body,
            json!({ "capabilities": { "devices": { "create": {
                "reusable": false, "ephemeral": true, "preauthorized": true, "tags": ["tag:web"],
            } } } })
        );
        let answer = br#"{"id":"k1","key":"tskey-auth-minted","created":"2026-01-01T00:00:00Z"}"#;
        let key = client.read(&question, StatusCode::OK, answer).unwrap();
        assert_eq!(key.expose(), "tskey-auth-minted");
    }

    #[test]
    fn a_no_is_told_in_the_apis_words_and_a_failure_is_tried_again() {
        let client = client();
        let token = Secret::new("TTTT");
        let question = client.for_key(&token, &[], false);
        let read = |status, body: &str| client.read(&question, status, body.as_bytes());
        let echo =
            r#"{"message":"requested tags [tag:web] are invalid: tskey-client-QQQQ-a+b TTTT"}"#;
        let Err(NoKey::Refused(words)) = read(StatusCode::BAD_REQUEST, echo) else {
            panic!()
        };
        assert!(words.contains("tags [tag:web] are invalid"), "{words}");
        assert!(
            !words.contains("QQQQ") && !words.contains("TTTT"),
            "{words}"
        );
        for status in [StatusCode::BAD_GATEWAY, StatusCode::TOO_MANY_REQUESTS] {
            let answer = read(status, "<html>");
            assert!(matches!(answer, Err(NoKey::Away(_))), "{answer:?}");
        }
        for body in ["", "{}", r#"{"key":5}"#, r#"{"key":""}"#, "[]"] {
            let answer = read(StatusCode::OK, body);
            assert!(matches!(answer, Err(NoKey::Refused(_))), "{body}");
        }
    }

    proptest! {
        #[test]
        fn no_answer_panics_or_shows_the_secret(status in 100..600u16, message: String) {
            let client = client();
            let body = json!({ "message": format!("{message} tskey-client-QQQQ-a+b") }).to_string();
            let status = StatusCode::from_u16(status).unwrap();
            let answer = client.read(&client.for_token(), status, body.as_bytes());
            let shown = format!("{answer:?}");
            prop_assert!(!shown.contains("QQQQ"));
        }
    }
}
