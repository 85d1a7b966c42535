//! How a node learns whom tailnet lock trusts (ipnlocal/tailnet-lock.go).

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::json;
use tailnode_wire::{
    keys::NodePublicKey,
    lock::{Authority, Error, VERSION},
    tailcfg::{TkaBootstrapResponse, TkaSyncOfferResponse},
};
use tracing::debug;

use super::{Connection, Failure, retry};
use crate::netmap::Lock;

/// Brings what is known up to `head`, the server's; `None`: the server says that lock is off.
pub async fn learn(
    connection: &Connection,
    node: &NodePublicKey,
    known: Option<&Authority>,
    head: Option<&str>,
) -> Result<Lock, Failure> {
    let bootstrap = async |ours: String| {
        let request = json!({ "Version": VERSION, "NodeKey": node, "Head": ours });
        let answer = connection.inquire("/machine/tka/bootstrap", &request);
        answer.await as Result<TkaBootstrapResponse, Failure>
    };
    let (mut authority, head) = match (known, head) {
        (None, None) => return Ok(Lock::Off),
        (Some(authority), None) => {
            let answer = bootstrap(authority.head().to_string()).await?;
            return if authority.is_ended_by(&decode(&answer.disablement_secret)?) {
                Ok(Lock::Off)
            } else {
                Err(retry(
                    "the control server says that it is off, and cannot prove it",
                ))
            };
        }
        (Some(authority), Some(head)) => (authority.clone(), head),
        (None, Some(head)) => {
            let answer = bootstrap(String::new()).await?;
            let genesis = decode(&answer.genesis_aum)?;
            (Authority::begin(&genesis).map_err(disbelief)?, head)
        }
    };
    if authority.head().to_string() != head {
        let request = json!({
            "Version": VERSION, "NodeKey": node, "Head": authority.head().to_string(),
            "Ancestors": [authority.genesis().to_string()],
        });
        let offer = connection.inquire("/machine/tka/sync/offer", &request);
        let offer: TkaSyncOfferResponse = offer.await?;
        let missing = offer.missing_aums.iter().map(|update| decode(update));
        authority
            .inform(missing.collect::<Result<_, _>>()?)
            .map_err(disbelief)?;
        // So that the server knows where we are. Nothing depends on it.
        let request = json!({
            "Version": VERSION, "NodeKey": node, "Head": authority.head().to_string(),
            "MissingAUMs": [], "Interactive": false,
        });
        let told = connection.inquire::<serde_json::Value>("/machine/tka/sync/send", &request);
        if let Err(failure) = told.await {
            debug!(
                ?failure,
                "the control server was not told of our tailnet lock"
            );
        }
    }
    Ok(Lock::On(authority))
}

fn decode(text: &str) -> Result<Vec<u8>, Failure> {
    STANDARD.decode(text).map_err(|error| {
        retry(format!(
            "what the control server says of it is no base64: {error}"
        ))
    })
}

fn disbelief(error: Error) -> Failure {
    retry(format!(
        "what the control server says of it is not believed: {error}"
    ))
}
