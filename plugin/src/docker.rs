//! Docker's network driver `tailscale`: libnetwork's remote driver protocol, version 1.2, over a
//! plugin socket (moby: libnetwork/docs/remote.md, libnetwork/drivers/remote).
//!
//! Docker puts no limit on the time of a request, and holds the container's lock meanwhile: every
//! answer here comes within ten seconds.

mod engine;

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{Method, StatusCode, Uri, header},
    response::{IntoResponse, Response},
};
use ipnet::IpNet;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::{
    Error,
    api::Engine,
    endpoints::{Endpoints, Guest, Key, Tun, lock},
    interface,
    options::Layer,
};

/// What Docker's own plugins say.
const CONTENT_TYPE: &str = "application/vnd.docker.plugins.v1.2+json";

/// How long a node may take to get its addresses, with the questions to Docker before it: with
/// Docker's own work around it, a start fails within ten seconds.
const JOIN: Duration = Duration::from_millis(8_500);

/// The key under which CreateNetwork has what the user gave with `-o`
/// (libnetwork/netlabel: GenericData).
const GENERIC: &str = "com.docker.network.generic";

/// The driver.
pub(crate) struct Plugin {
    endpoints: Arc<Endpoints>,
    engine: engine::Docker,
    /// Endpoints that are made and not yet deleted, with the options of one container on the
    /// network, which Docker tells only when it makes them.
    made: Mutex<HashMap<String, Made>>,
}

/// What Docker tells of an endpoint only when it makes it.
#[derive(Clone)]
struct Made {
    options: BTreeMap<String, String>,
    /// What Docker's own IPAM chose, and resolves the container's name to.
    address: Option<IpNet>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct CreateNetwork {
    #[serde(default)]
    options: Option<BTreeMap<String, Value>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct CreateEndpoint {
    #[serde(rename = "EndpointID")]
    endpoint_id: String,
    #[serde(default)]
    interface: Option<Addresses>,
    #[serde(default)]
    options: Option<BTreeMap<String, Value>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Addresses {
    #[serde(default)]
    address: String,
}

/// Join, Leave and DeleteEndpoint.
#[derive(Deserialize)]
struct OfEndpoint {
    #[serde(rename = "NetworkID")]
    network_id: String,
    #[serde(rename = "EndpointID")]
    endpoint_id: String,
}

impl Plugin {
    /// The driver for the Docker whose API is at `socket`.
    pub(crate) fn new(endpoints: Arc<Endpoints>, socket: PathBuf) -> Arc<Self> {
        Arc::new(Plugin {
            endpoints,
            engine: engine::Docker::new(socket),
            made: Mutex::default(),
        })
    }

    /// What to serve on the plugin's socket.
    pub(crate) fn router(self: Arc<Self>) -> Router {
        Router::new().fallback(answer).with_state(self)
    }

    /// Logs which containers lost their nodes when an earlier daemon ended: Docker tells a plugin
    /// only of containers that start.
    pub(crate) async fn report_orphans(&self) {
        match self.engine.running("tailscale").await {
            Ok(containers) => {
                for container in containers {
                    self.endpoints
                        .report_orphan(Engine::Docker, &container.id, container.name());
                }
            }
            Err(error) => tracing::debug!("no containers of Docker's looked for: {error}"),
        }
    }

    async fn call(self: Arc<Self>, method: &str, body: &[u8]) -> Result<Value, Error> {
        match method {
            "/Plugin.Activate" => Ok(json!({"Implements": ["NetworkDriver"]})),
            // Each host has its own networks: Docker need not spread them over a swarm.
            "/NetworkDriver.GetCapabilities" => {
                Ok(json!({"Scope": "local", "ConnectivityScope": "local"}))
            }
            "/NetworkDriver.CreateNetwork" => self.create_network(parse(body)?),
            "/NetworkDriver.CreateEndpoint" => self.create_endpoint(parse(body)?),
            "/NetworkDriver.Join" => self.join(parse(body)?).await,
            "/NetworkDriver.Leave" => {
                let request: OfEndpoint = parse(body)?;
                // The node goes on: Docker still has to take its device out of the container.
                self.endpoints.release_device(&request.key()).await;
                Ok(json!({}))
            }
            "/NetworkDriver.DeleteEndpoint" => {
                let request: OfEndpoint = parse(body)?;
                lock(&self.made).remove(&request.endpoint_id);
                self.endpoints.detach(&request.key()).await;
                Ok(json!({}))
            }
            "/NetworkDriver.EndpointOperInfo" => Ok(json!({"Value": {}})),
            "/NetworkDriver.DeleteNetwork"
            | "/NetworkDriver.DiscoverNew"
            | "/NetworkDriver.DiscoverDelete"
            | "/NetworkDriver.ProgramExternalConnectivity"
            | "/NetworkDriver.RevokeExternalConnectivity"
            | "/NetworkDriver.FreeNetwork" => Ok(json!({})),
            // AllocateNetwork is for drivers of a whole swarm, and so may others be in a Docker to
            // come: it takes "not found" for "not implemented".
            _ => Err(Error::NoMethod {
                method: method.to_owned(),
            }),
        }
    }

    fn create_network(&self, request: CreateNetwork) -> Result<Value, Error> {
        let mut options = request.options.unwrap_or_default();
        let given = match options.remove(GENERIC) {
            Some(Value::Object(given)) => given.into_iter().collect(),
            _ => BTreeMap::new(),
        };
        // Docker keeps them, and tells them again when a container joins.
        self.endpoints
            .allows(&Layer::of_network("", &texts(given))?)?;
        Ok(json!({}))
    }

    fn create_endpoint(&self, request: CreateEndpoint) -> Result<Value, Error> {
        let mut given = request.options.unwrap_or_default();
        // Docker's own come in the same map.
        given.retain(|key, _| !key.starts_with("com.docker."));
        let given = texts(given);
        Layer::of_endpoint(&given)?;
        let address = request
            .interface
            .and_then(|interface| interface.address.parse().ok());
        let made = Made {
            options: given,
            address,
        };
        lock(&self.made).insert(request.endpoint_id, made);
        // No addresses: Docker has chosen some already or, with the null IPAM driver, wants none.
        // And no MAC address, ever: a TUN has none, and setting one fails the start.
        Ok(json!({"Interface": {}}))
    }

    async fn join(self: Arc<Self>, request: OfEndpoint) -> Result<Value, Error> {
        let deadline = Instant::now() + JOIN;
        let device = device_name(&request.endpoint_id);
        let source = device.clone();
        // A task of its own: when dockerd ends and the request with it, what was begun is still
        // finished or undone.
        let joined = tokio::spawn(async move {
            let guest = self.guest(&request).await?;
            let (container, network) = (guest.container_name.clone(), guest.network_name.clone());
            self.endpoints
                .attach(guest, Tun::Make(device), deadline)
                .await
                .map_err(|error| Error::Daemon {
                    message: format!("container {container} on network {network}: {error}"),
                })
        });
        match joined.await {
            Ok(result) => result?,
            Err(error) => {
                return Err(Error::Daemon {
                    message: format!("joining failed ({error}): see `journalctl -u tailnoded`"),
                });
            }
        };
        // Without a gateway Docker adds its own way to the Internet for containers that are on no
        // other network, as it does for the networks it ships with.
        Ok(json!({"InterfaceName": {"SrcName": source, "DstPrefix": interface::PREFIX}}))
    }

    /// Who wants to join; Docker's request does not say.
    async fn guest(&self, request: &OfEndpoint) -> Result<Guest, Error> {
        let made = lock(&self.made)
            .get(&request.endpoint_id)
            .cloned()
            .ok_or_else(|| Error::UnknownEndpoint {
                endpoint: request.endpoint_id.clone(),
            })?;
        let (network, container) = self
            .engine
            .find(&request.network_id, &request.endpoint_id)
            .await?;
        let named = |error: Error| Error::Daemon {
            message: format!(
                "container {} on network {}: {error}",
                container.name(),
                network.name
            ),
        };
        let of_network = Layer::of_network(&network.name, network.options()).map_err(named)?;
        let of_marks = Layer::of_marks(&container.marks()).map_err(named)?;
        let of_endpoint = Layer::of_endpoint(&made.options).map_err(named)?;
        Ok(Guest {
            key: request.key(),
            container_id: container.id.clone(),
            container_name: container.name().to_owned(),
            network_name: network.name.clone(),
            exist: self.engine.names().await.ok(),
            address: made.address,
            layers: vec![of_network, of_marks, of_endpoint],
        })
    }
}

impl OfEndpoint {
    fn key(&self) -> Key {
        Key {
            engine: Engine::Docker,
            id: self.endpoint_id.clone(),
            network_id: self.network_id.clone(),
        }
    }
}

/// The device's name until Docker moves it: `tn` and the beginning of the endpoint's id.
fn device_name(endpoint_id: &str) -> String {
    format!("tn{}", endpoint_id.get(..8).unwrap_or(endpoint_id))
}

async fn answer(
    State(plugin): State<Arc<Plugin>>,
    http_method: Method,
    uri: Uri,
    body: Bytes,
) -> Response {
    let method = uri.path();
    tracing::debug!(method, "request of Docker's");
    let result = if http_method == Method::POST {
        plugin.call(method, &body).await
    } else {
        Err(Error::NoMethod {
            method: format!("{http_method} {method}"),
        })
    };
    let (status, body) = match result {
        Ok(answer) => (StatusCode::OK, answer),
        Err(error) => {
            // With any status but 200 Docker puts the method's name before our words instead of
            // "remote:", and it takes 404 for a method that is not there.
            let status = match error {
                Error::NoMethod { .. } => StatusCode::NOT_FOUND,
                _ => {
                    tracing::warn!(method, "refused: {error}");
                    StatusCode::OK
                }
            };
            (status, json!({"Err": format!("tailnode: {error}")}))
        }
    };
    (
        status,
        [(header::CONTENT_TYPE, CONTENT_TYPE)],
        body.to_string(),
    )
        .into_response()
}

/// Docker does not always say that its bodies are JSON.
fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(body).map_err(|error| Error::Message {
        // Without serde's own words: they quote what they fail on, which may be a secret.
        cause: std::io::Error::other(format!(
            "it is no request of Docker's, from line {} column {} on",
            error.line(),
            error.column()
        )),
    })
}

/// The options as text. Docker's are texts already, but nothing in the protocol says so.
fn texts(options: BTreeMap<String, Value>) -> BTreeMap<String, String> {
    options
        .into_iter()
        .map(|(key, value)| match value {
            Value::String(text) => (key, text),
            other => (key, other.to_string()),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use http_body_util::{BodyExt, Full};
    use hyper_util::rt::TokioIo;
    use tempfile::TempDir;
    use tokio::net::{UnixListener, UnixStream};

    use super::*;
    use crate::secrets::Secrets;

    /// A plugin on a socket, for a Docker that is not there.
    struct Served {
        directory: TempDir,
        plugin: Arc<Plugin>,
    }

    fn serve() -> Served {
        let directory = tempfile::tempdir().unwrap();
        let endpoints = Endpoints::new(
            directory.path().join("nodes"),
            Layer::default(),
            Secrets::new("/nonexistent".into(), None, "/nonexistent".into()),
            tailnode_node::Offload::All,
        )
        .unwrap();
        let plugin = Plugin::new(Arc::new(endpoints), directory.path().join("docker.sock"));
        let listener = UnixListener::bind(directory.path().join("tailscale.sock")).unwrap();
        let router = plugin.clone().router();
        tokio::spawn(async move { axum::serve(listener, router).await });
        Served { directory, plugin }
    }

    impl Served {
        /// Sends what dockerd sends, header for header.
        async fn post(&self, method: &str, body: &str) -> (StatusCode, Value) {
            let stream = UnixStream::connect(self.directory.path().join("tailscale.sock"))
                .await
                .unwrap();
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream))
                    .await
                    .unwrap();
            tokio::spawn(connection);
            let request = hyper::Request::post(method)
                .header("Host", "%2Frun%2Fdocker%2Fplugins%2Ftailscale.sock")
                .header("User-Agent", "Go-http-client/1.1")
                .header("Accept", "application/vnd.docker.plugins.v1.2+json")
                .body(Full::new(Bytes::from(body.to_owned())))
                .unwrap();
            let response = sender.send_request(request).await.unwrap();
            assert_eq!(response.headers()["content-type"], CONTENT_TYPE);
            let status = response.status();
            let body = response.into_body().collect().await.unwrap().to_bytes();
            (status, serde_json::from_slice(&body).unwrap())
        }

        async fn error(&self, method: &str, body: &str) -> String {
            let (status, answer) = self.post(method, body).await;
            assert_eq!(status, StatusCode::OK);
            answer["Err"]
                .as_str()
                .unwrap_or_else(|| panic!("{method}: no error in {answer}"))
                .to_owned()
        }
    }

    #[tokio::test]
    async fn docker_gets_to_know_the_driver() {
        let served = serve();
        let (status, answer) = served.post("/Plugin.Activate", "").await;
        assert_eq!(
            (status, answer),
            (StatusCode::OK, json!({"Implements": ["NetworkDriver"]}))
        );
        let (_, answer) = served.post("/NetworkDriver.GetCapabilities", "").await;
        assert_eq!(answer["Scope"], "local");
        let (status, answer) = served.post("/NetworkDriver.GwAllocCheck", "{}").await;
        assert_eq!(status, StatusCode::NOT_FOUND);
        assert!(answer["Err"].is_string());
    }

    #[tokio::test]
    async fn a_network_is_made_unless_its_options_are_wrong() {
        let served = serve();
        let create = |generic: &str| {
            format!(
                r#"{{"NetworkID":"8f4a5d6f","Options":{{"com.docker.network.enable_ipv6":false,
                "com.docker.network.generic":{generic}}},
                "IPv4Data":[{{"AddressSpace":"LocalDefault","Gateway":"172.19.0.1/16","Pool":"172.19.0.0/16"}}],
                "IPv6Data":[]}}"#
            )
        };
        let method = "/NetworkDriver.CreateNetwork";
        for generic in [
            "{}",
            "null",
            r#"{"tags":"tag:web","login-server":"http://127.0.0.1:8080"}"#,
        ] {
            let (status, answer) = served.post(method, &create(generic)).await;
            assert_eq!((status, answer), (StatusCode::OK, json!({})), "{generic}");
        }
        let error = served.error(method, &create(r#"{"hostnmae":"web"}"#)).await;
        assert_eq!(
            error,
            "tailnode: unknown option `hostnmae` on the network: did you mean `hostname`?"
        );
        let error = served
            .error(method, &create(r#"{"auth-key":"tskey-auth-abc"}"#))
            .await;
        assert!(
            error.contains("install -m 600") && !error.contains("abc"),
            "{error}"
        );
        assert!(
            served
                .error(method, "not JSON")
                .await
                .contains("cannot read a message")
        );
    }

    #[tokio::test]
    async fn an_endpoint_gets_no_address_and_its_options_are_kept() {
        let served = serve();
        let create = |options: &str| {
            format!(
                r#"{{"NetworkID":"8f4a5d6f","EndpointID":"0a1b2c3d4e5f","Interface":{{"Address":"172.19.0.2/16",
                "AddressIPv6":"","MacAddress":""}},"Options":{{"com.docker.network.endpoint.exposedports":[],
                "com.docker.network.portmap":[],"com.docker.network.endpoint.dnsservers":null{options}}}}}"#
            )
        };
        let method = "/NetworkDriver.CreateEndpoint";
        let (status, answer) = served.post(method, &create(r#","hostname":"web""#)).await;
        assert_eq!((status, answer), (StatusCode::OK, json!({"Interface": {}})));
        let made = lock(&served.plugin.made)["0a1b2c3d4e5f"].clone();
        assert_eq!(
            made.options,
            [("hostname".to_owned(), "web".to_owned())].into()
        );
        assert_eq!(made.address, "172.19.0.2/16".parse().ok());
        let error = served
            .error(method, &create(r#","login-server":"http://10.0.0.1""#))
            .await;
        assert!(error.contains("belongs to the network"), "{error}");

        let endpoint = r#"{"NetworkID":"8f4a5d6f","EndpointID":"0a1b2c3d4e5f"}"#;
        let (_, answer) = served
            .post("/NetworkDriver.EndpointOperInfo", endpoint)
            .await;
        assert_eq!(answer, json!({"Value": {}}));
        for _ in 0..2 {
            let (status, answer) = served.post("/NetworkDriver.DeleteEndpoint", endpoint).await;
            assert_eq!((status, answer), (StatusCode::OK, json!({})));
        }
        assert!(lock(&served.plugin.made).is_empty());
    }

    #[tokio::test]
    async fn a_join_that_cannot_be_says_why() {
        let served = serve();
        let join = r#"{"NetworkID":"8f4a5d6f","EndpointID":"0a1b2c3d4e5f",
            "SandboxKey":"/var/run/docker/netns/1a2b","Options":{}}"#;
        let error = served.error("/NetworkDriver.Join", join).await;
        assert!(error.contains("start the container again"), "{error}");

        let create =
            r#"{"NetworkID":"8f4a5d6f","EndpointID":"0a1b2c3d4e5f","Interface":{},"Options":null}"#;
        served.post("/NetworkDriver.CreateEndpoint", create).await;
        let error = served.error("/NetworkDriver.Join", join).await;
        assert!(
            error.contains("cannot ask Docker at") && error.contains("docker.sock"),
            "{error}"
        );
    }

    #[test]
    fn the_device_has_a_name_that_linux_takes() {
        assert_eq!(device_name("0a1b2c3d4e5f6a7b"), "tn0a1b2c3d");
        assert_eq!(device_name("0a"), "tn0a");
    }
}
