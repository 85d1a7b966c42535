//! What Docker is asked, over its API: only what it answers without a container's lock, which it
//! holds while it waits for us.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::PathBuf,
    time::Duration,
};

use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, StatusCode, body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, de::DeserializeOwned};
use tokio::net::UnixStream;
use url::form_urlencoded;

use crate::{Error, options::Marks};

/// For all the questions of one join together.
const PATIENCE: Duration = Duration::from_secs(2);

/// The largest answer, in bytes: a list of containers takes about 2 KB for each.
const MAX_ANSWER: usize = 64 << 20;

/// Docker's API.
pub(super) struct Docker {
    socket: PathBuf,
}

/// A network, of `GET /networks/ID`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Network {
    pub(super) name: String,
    #[serde(default)]
    options: Option<BTreeMap<String, String>>,
    #[serde(default)]
    containers: Option<HashMap<String, Member>>,
}

#[derive(Debug, Deserialize)]
struct Member {
    #[serde(rename = "Name")]
    name: String,
    #[serde(rename = "EndpointID")]
    endpoint_id: String,
}

/// A container, of `GET /containers/json`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Container {
    pub(super) id: String,
    names: Vec<String>,
    #[serde(default)]
    labels: Option<BTreeMap<String, String>>,
    #[serde(default)]
    host_config: Option<HostConfig>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HostConfig {
    /// Since version 1.46 of the API.
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

static NOTHING: BTreeMap<String, String> = BTreeMap::new();

impl Network {
    /// What was given with `-o`.
    pub(super) fn options(&self) -> &BTreeMap<String, String> {
        self.options.as_ref().unwrap_or(&NOTHING)
    }

    /// The name of the container whose endpoint this is.
    fn member(&self, endpoint_id: &str) -> Option<&str> {
        let members = self.containers.iter().flat_map(HashMap::values);
        members
            .into_iter()
            .find(|member| member.endpoint_id == endpoint_id)
            .map(|member| &*member.name)
    }
}

impl Container {
    /// Its own name: others are links, with a second slash.
    pub(super) fn name(&self) -> &str {
        let mut names = self.names.iter().filter_map(|name| name.strip_prefix('/'));
        names.find(|name| !name.contains('/')).unwrap_or(&self.id)
    }

    /// What it carries. Docker tells of an environment only under the container's lock.
    pub(super) fn marks(&self) -> Marks {
        let host_config = self.host_config.as_ref();
        let annotations = host_config.and_then(|config| config.annotations.clone());
        Marks {
            labels: self.labels.clone().unwrap_or_default(),
            annotations: annotations.unwrap_or_default(),
            environment: BTreeMap::new(),
        }
    }
}

impl Docker {
    pub(super) fn new(socket: PathBuf) -> Self {
        Docker { socket }
    }

    /// The network, and the container that is just joining it by this endpoint.
    pub(super) async fn find(
        &self,
        network_id: &str,
        endpoint_id: &str,
    ) -> Result<(Network, Container), Error> {
        self.in_time(async {
            let network: Network = self.get(&format!("/networks/{network_id}")).await?;
            let name = network.member(endpoint_id).ok_or_else(|| {
                self.failed(format!(
                    "network {} has no endpoint {endpoint_id}",
                    network.name
                ))
            })?;
            // Docker takes the name for a regular expression; a dot in it fits more than itself.
            let found = self.containers(&[("name", &format!("^/?{name}$"))]).await?;
            let container = found
                .into_iter()
                .find(|container| container.name() == name)
                .ok_or_else(|| self.failed(format!("there is no container {name}")))?;
            Ok((network, container))
        })
        .await
    }

    /// The running containers that are on networks of a driver.
    pub(super) async fn running(&self, driver: &str) -> Result<Vec<Container>, Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Listed {
            id: String,
        }
        self.in_time(async {
            let path = format!("/networks?{}", filters(&[("driver", driver)]));
            let networks: Vec<Listed> = self.get(&path).await?;
            let mut running = Vec::new();
            for network in networks {
                let filters = [("network", &*network.id), ("status", "running")];
                running.extend(self.containers_where("", &filters).await?);
            }
            Ok(running)
        })
        .await
    }

    /// The names of all containers.
    pub(super) async fn names(&self) -> Result<HashSet<String>, Error> {
        let all = self.in_time(self.containers(&[])).await?;
        Ok(all.iter().map(|all| all.name().to_owned()).collect())
    }

    async fn containers(&self, filters: &[(&str, &str)]) -> Result<Vec<Container>, Error> {
        self.containers_where("all=1&", filters).await
    }

    async fn containers_where(
        &self,
        query: &str,
        conditions: &[(&str, &str)],
    ) -> Result<Vec<Container>, Error> {
        self.get(&format!("/containers/json?{query}{}", filters(conditions)))
            .await
    }

    async fn in_time<T>(
        &self,
        questions: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let late = |_| self.failed(format!("no answer within {PATIENCE:?}"));
        tokio::time::timeout(PATIENCE, questions)
            .await
            .map_err(late)?
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Error> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|error| self.failed(error))?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.failed(error))?;
        // It ends with the sender, at the end of this function.
        let connection = tokio::spawn(connection);
        let request = Request::get(path)
            .header("Host", "docker")
            .body(Empty::<Bytes>::new())
            .map_err(|error| self.failed(error))?;
        let response = sender
            .send_request(request)
            .await
            .map_err(|error| self.failed(error))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER)
            .collect()
            .await;
        connection.abort();
        let body = body.map_err(|error| self.failed(error))?.to_bytes();
        if status != StatusCode::OK {
            let words = String::from_utf8_lossy(&body);
            return Err(self.failed(format!("{status} for {path}: {}", words.trim())));
        }
        // Without serde's own words: they quote what they fail on, and labels hold what people put
        // there.
        serde_json::from_slice(&body).map_err(|error| {
            let (line, column) = (error.line(), error.column());
            self.failed(format!(
                "{path}: the answer is not what it was, from line {line} column {column} on"
            ))
        })
    }

    fn failed(&self, reason: impl ToString) -> Error {
        Error::Docker {
            socket: self.socket.clone(),
            reason: reason.to_string(),
        }
    }
}

/// Docker's `filters` parameter: JSON, form-encoded.
fn filters(conditions: &[(&str, &str)]) -> String {
    let conditions: BTreeMap<_, _> = conditions
        .iter()
        .map(|(key, value)| (*key, vec![*value]))
        .collect();
    let json = serde_json::json!(conditions).to_string();
    form_urlencoded::Serializer::new(String::new())
        .append_pair("filters", &json)
        .finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_at_join_names_the_container() {
        let network: Network = serde_json::from_str(
            r#"{"Name":"tailnet","Id":"8f4a5d6f","Created":"2026-09-01T10:00:00Z","Scope":"local",
            "Driver":"tailscale","EnableIPv6":false,"IPAM":{"Driver":"default","Options":{},
            "Config":[{"Subnet":"172.19.0.0/16","Gateway":"172.19.0.1"}]},"Internal":false,
            "ConfigFrom":{"Network":""},"ConfigOnly":false,
            "Containers":{"ep-0a1b2c3d4e5f":{"Name":"cc7","EndpointID":"0a1b2c3d4e5f","MacAddress":"",
            "IPv4Address":"172.19.0.2/16","IPv6Address":""}},"Options":{"tags":"tag:web"},"Labels":{}}"#,
        )
        .unwrap();
        assert_eq!(network.name, "tailnet");
        assert_eq!(network.options()["tags"], "tag:web");
        assert_eq!(network.member("0a1b2c3d4e5f"), Some("cc7"));
        assert_eq!(network.member("ffff"), None);
        let bare: Network =
            serde_json::from_str(r#"{"Name":"n","Containers":null,"Options":null}"#).unwrap();
        assert!(bare.options().is_empty() && bare.member("x").is_none());
    }

    #[test]
    fn a_container_in_the_list_has_id_and_labels() {
        let list: Vec<Container> = serde_json::from_str(
            r#"[{"Id":"ae48c7267541","Names":["/other/alias","/cc7"],"Image":"busybox","State":"created",
            "Labels":{"tailscale.hostname":"web"},"HostConfig":{"NetworkMode":"tailnet",
            "Annotations":{"tailscale.tags":"tag:web"}}},
            {"Id":"b0","Names":[],"Labels":null}]"#,
        )
        .unwrap();
        assert_eq!(list[0].name(), "cc7");
        let marks = list[0].marks();
        assert_eq!(marks.labels["tailscale.hostname"], "web");
        assert_eq!(marks.annotations["tailscale.tags"], "tag:web");
        assert_eq!(list[1].marks(), Marks::default());
        assert_eq!(list[1].name(), "b0");
    }

    #[test]
    fn filters_are_encoded() {
        assert_eq!(
            filters(&[("name", "^/?cc7$")]),
            "filters=%7B%22name%22%3A%5B%22%5E%2F%3Fcc7%24%22%5D%7D"
        );
    }
}
