//! What a runtime says to a plugin in its environment and on standard input, and reads from its
//! output: <https://github.com/containernetworking/cni/blob/main/SPEC.md>, version 1.1.0.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tailnode_plugin::{
    Error,
    api::Engine,
    options::Layer,
    shim::{Attached, Place},
};
/// The versions of the interface that are spoken, the newest last.
pub const VERSIONS: [&str; 3] = ["0.4.0", "1.0.0", "1.1.0"];
const NEWEST: &str = VERSIONS[2];
/// What a configuration without a version is of.
const UNSAID: &str = "0.1.0";

/// The capability by which runtimes of Kubernetes hand a pod's annotations on.
const ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";

/// Why a command failed, as the runtime reads it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Failure {
    #[serde(rename = "cniVersion")]
    version: String,
    code: u32,
    msg: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    details: String,
}

/// The specification's codes, and from 100 on those of this plugin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    IncompatibleVersion = 1,
    UnsupportedField = 2,
    UnknownContainer = 3,
    Environment = 4,
    Io = 5,
    Decode = 6,
    Config = 7,
    TryAgain = 11,
    /// STATUS alone: no container can be attached now.
    Unavailable = 50,
    /// The tailnet, the daemon or the host's configuration does not let the node in.
    Refused = 100,
    /// The container is attached by this interface already.
    Attached = 101,
    /// What ADD made is not as it was: CHECK alone.
    Missing = 102,
    /// The device could not be made or set up.
    Device = 103,
}

impl Failure {
    pub fn new(code: Code, msg: impl Into<String>) -> Failure {
        Failure {
            version: NEWEST.into(),
            code: code as u32,
            msg: msg.into(),
            details: String::new(),
        }
    }

    fn details(self, details: String) -> Failure {
        Failure { details, ..self }
    }

    /// The same, by another code.
    pub fn with(self, code: Code) -> Failure {
        let code = code as u32;
        Failure { code, ..self }
    }

    /// The same, said of the container and network that it is about.
    pub fn about(self, subject: &str) -> Failure {
        let msg = format!("{subject}: {}", self.msg);
        Failure { msg, ..self }
    }

    /// The same, in the version that the configuration is of.
    pub fn in_version(self, version: &str) -> Failure {
        let version = version.into();
        Failure { version, ..self }
    }
}

/// What did not work for one container, told by the code that says what the runtime may do.
impl From<Box<Error>> for Failure {
    fn from(error: Box<Error>) -> Failure {
        let code = match *error {
            Error::NotRunning { .. } | Error::Unanswered { .. } => Code::TryAgain,
            Error::Tun(tailnode_tun::Error::Netns { .. }) => Code::UnknownContainer,
            Error::Tun(_) => Code::Device,
            _ => Code::Refused,
        };
        Failure::new(code, error.to_string())
    }
}

impl From<tailnode_tun::Error> for Failure {
    fn from(error: tailnode_tun::Error) -> Failure {
        Box::new(Error::from(error)).into()
    }
}

/// A command, and what it is about.
#[derive(Debug, PartialEq)]
pub enum Command {
    Add(Network, Attachment),
    Del(Network, Attachment),
    Check(Network, Attachment),
    /// With the attachments that are owned.
    Gc(Network, Vec<Place>),
    Status(Network),
    /// With the version that the runtime named.
    Version(String),
}

/// A container's attachment by one interface: what the environment says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attachment {
    pub container_id: String,
    /// The path of its namespace; empty where DEL comes without.
    pub netns: String,
    pub ifname: String,
    /// In Kubernetes, of the pod.
    pod: Option<String>,
    namespace: Option<String>,
}

/// The network's configuration: what standard input says.
#[derive(Debug, PartialEq)]
pub struct Network {
    pub version: String,
    pub name: String,
    pub options: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
    /// What the plugins before this one did; at CHECK and DEL, all of them.
    previous: Option<Map<String, Value>>,
}

#[derive(Deserialize)]
struct Config {
    name: Option<String>,
    options: Option<Map<String, Value>>,
    ipam: Option<Map<String, Value>>,
    #[serde(rename = "runtimeConfig")]
    runtime: Option<Map<String, Value>>,
    #[serde(rename = "prevResult")]
    previous: Option<Map<String, Value>>,
    #[serde(rename = "cni.dev/valid-attachments")]
    owned: Option<Vec<Owned>>,
}

#[derive(Deserialize)]
struct Owned {
    #[serde(rename = "containerID")]
    container_id: String,
    ifname: String,
}

impl Command {
    /// Reads a command of this name. `variable` is the environment.
    pub fn read(
        name: &str,
        variable: impl Fn(&str) -> Option<String>,
        input: &str,
    ) -> Result<Command, Failure> {
        let known = ["ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION"];
        if !known.contains(&name) {
            let msg = format!("CNI_COMMAND is {name:?}; there are: {}", known.join(", "));
            return Err(Failure::new(Code::Environment, msg));
        }
        // Earlier versions let a runtime ask for the version without a word.
        let config = match input.trim() {
            "" if name == "VERSION" => json!({ "cniVersion": NEWEST }),
            input => serde_json::from_str(input).map_err(undecoded)?,
        };
        let version = match &config["cniVersion"] {
            Value::Null => UNSAID,
            Value::String(version) => version,
            _ => return Err(Failure::new(Code::Decode, "cniVersion is no text")),
        };
        if name == "VERSION" {
            return Ok(Command::Version(version.to_owned()));
        }
        let late = matches!(name, "GC" | "STATUS");
        if !VERSIONS.contains(&version) || (late && version != NEWEST) {
            let spoken = if late { &VERSIONS[2..] } else { &VERSIONS[..] };
            let msg = format!(
                "the network's configuration is of CNI {version}, and {name} is done for {}: set \
                 its cniVersion to one of these",
                spoken.join(", ")
            );
            return Err(Failure::new(Code::IncompatibleVersion, msg));
        }
        let version = version.to_owned();
        Command::of(name, &variable, &version, config)
            .map_err(|failure| failure.in_version(&version))
    }

    fn of(
        command: &str,
        variable: &impl Fn(&str) -> Option<String>,
        version: &str,
        config: Value,
    ) -> Result<Command, Failure> {
        let attachment = match command {
            "GC" | "STATUS" => Attachment::default(),
            _ => Attachment::of(command, variable)?,
        };
        let mut config = Config::deserialize(config).map_err(undecoded)?;
        // libcni leaves an empty list out (cnitool), or writes null.
        let owned = config.owned.take().unwrap_or_default();
        let network = Network::of(config, version)?;
        let invalid = |msg: &str| Failure::new(Code::Config, msg);
        Ok(match command {
            "ADD" => {
                network.allowed()?;
                Command::Add(network, attachment)
            }
            "DEL" => Command::Del(network, attachment),
            "CHECK" if network.previous.is_none() => {
                return Err(invalid("CHECK comes without prevResult, the result of ADD"));
            }
            "CHECK" => Command::Check(network, attachment),
            "GC" => {
                let place = |it: Owned| network.place(it.container_id, &it.ifname);
                let owned = owned.into_iter().map(place).collect();
                Command::Gc(network, owned)
            }
            _ => {
                network.allowed()?;
                Command::Status(network)
            }
        })
    }
}

impl Attachment {
    fn of(command: &str, variable: &impl Fn(&str) -> Option<String>) -> Result<Self, Failure> {
        let wrong = |name: &str, why: &str| {
            Failure::new(Code::Environment, format!("{name} {why} ({command})"))
        };
        let required = |name: &str| {
            let value = variable(name).filter(|value| !value.is_empty());
            value.ok_or_else(|| wrong(name, "is not set"))
        };
        let container_id = required("CNI_CONTAINERID")?;
        if !is_name(&container_id) {
            return Err(wrong("CNI_CONTAINERID", "is no container's id"));
        }
        let ifname = required("CNI_IFNAME")?;
        let bad = |c: char| c.is_whitespace() || c.is_control() || "/:%".contains(c);
        if ifname.len() > 15 || ifname == "." || ifname == ".." || ifname.contains(bad) {
            return Err(wrong("CNI_IFNAME", "cannot be the name of a device"));
        }
        let netns = match command {
            "DEL" => variable("CNI_NETNS").unwrap_or_default(),
            _ => required("CNI_NETNS")?,
        };
        let mut attachment = Attachment {
            container_id,
            netns,
            ifname,
            ..Attachment::default()
        };
        let extra = variable("CNI_ARGS").unwrap_or_default();
        for pair in extra.split(';').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair
                .split_once('=')
                .ok_or_else(|| wrong("CNI_ARGS", "is not of the form KEY=VALUE;KEY=VALUE"))?;
            match key {
                "K8S_POD_NAME" => attachment.pod = Some(value.to_owned()),
                "K8S_POD_NAMESPACE" => attachment.namespace = Some(value.to_owned()),
                _ => {}
            }
        }
        Ok(attachment)
    }

    /// What the container is called, and its node if nobody says otherwise: `POD.NAMESPACE`, in the
    /// order of Kubernetes' own DNS, since pods of two namespaces may share a name.
    pub fn name(&self) -> String {
        match (&self.pod, &self.namespace) {
            (Some(pod), Some(namespace)) => format!("{pod}.{namespace}"),
            (Some(pod), None) => pod.clone(),
            // An id that is no name is as well told by its beginning.
            (None, _) if self.container_id.len() < 64 => self.container_id.clone(),
            (None, _) => self.container_id.chars().take(12).collect(),
        }
    }
}

impl Network {
    fn of(config: Config, version: &str) -> Result<Network, Failure> {
        let invalid = |msg: String| Failure::new(Code::Config, msg);
        let name = config.name.filter(|name| is_name(name)).ok_or_else(|| {
            invalid("the configuration has no name, or one with odd letters".into())
        })?;
        if let Some(ipam) = config.ipam.filter(|ipam| !ipam.is_empty()) {
            let msg = format!("ipam: {}: not supported", Value::Object(ipam));
            let advice = "the tailnet gives the addresses: leave it out";
            return Err(Failure::new(Code::UnsupportedField, msg).details(advice.into()));
        }
        let mut options = BTreeMap::new();
        for (key, value) in config.options.unwrap_or_default() {
            let text = text_of(&value).ok_or_else(|| {
                invalid(format!(
                    "options: `{key}` must be a text, true or false, or a list of texts"
                ))
            })?;
            options.insert(key, text);
        }
        let annotations = config
            .runtime
            .and_then(|mut runtime| runtime.remove(ANNOTATIONS))
            .map_or(Ok(None), Option::deserialize)
            .map_err(undecoded)?;
        Ok(Network {
            version: version.to_owned(),
            name,
            options,
            annotations: annotations.unwrap_or_default(),
            previous: config.previous,
        })
    }

    /// Whether the options can be a network's.
    fn allowed(&self) -> Result<(), Failure> {
        let Err(error) = Layer::of_network(&self.name, &self.options) else {
            return Ok(());
        };
        let details = error.to_string();
        // The specification wants the value in the message: not one that may be a secret.
        let value = |key: &str| match self.options.get(key) {
            Some(value) if !value.contains("tskey-") => value.clone(),
            _ => "…".into(),
        };
        Err(match error {
            Error::UnknownOption { key, .. } | Error::MissingFeature { key, .. } => {
                let msg = format!("options: {key}: {}: not supported", value(&key));
                Failure::new(Code::UnsupportedField, msg).details(details)
            }
            _ => Failure::new(Code::Config, format!("options: {details}")),
        })
    }

    /// Where the daemon keeps an attachment: a container may be on one network twice.
    pub fn place(&self, container_id: String, ifname: &str) -> Place {
        Place {
            engine: Engine::Cni,
            container_id,
            network_id: format!("{}/{ifname}", self.name),
            ..Place::default()
        }
    }

    /// The same, with all that is asked for it.
    pub fn place_of(&self, attachment: &Attachment) -> Place {
        Place {
            container_name: attachment.name(),
            network_name: self.name.clone(),
            network_options: self.options.clone(),
            annotations: self.annotations.clone(),
            device: (!self.is_chained()).then(|| attachment.ifname.clone()),
            ..self.place(attachment.container_id.clone(), &attachment.ifname)
        }
    }

    /// Whether another plugin has made the interface that the runtime asks for: a chain's later
    /// plugins add to that.
    pub fn is_chained(&self) -> bool {
        self.previous.is_some()
    }

    /// The result of ADD: that of the plugins before, and behind it what was attached. Only the
    /// tailnet's resolver comes first: it hands on what it does not know, and theirs do not.
    ///
    /// In a chain, addresses and routes are left out: the specification wants routes of the interface
    /// that the runtime names only, and the CNI project's own plugins look on that interface, at
    /// CHECK, for every address that a result has (plugins v1.6.2, ValidateExpectedInterfaceIPs).
    pub fn result(&self, netns: &str, attached: &Attached) -> Result<Value, Failure> {
        let mut result = self.previous.clone().unwrap_or_default();
        result.insert("cniVersion".into(), self.version.clone().into());
        let mut interface = json!({ "name": attached.device, "sandbox": netns });
        if self.version == NEWEST {
            interface["mtu"] = attached.interface.mtu.into();
        }
        let interfaces = list(&mut result, "interfaces")?;
        let number = interfaces.len();
        interfaces.push(interface);
        let (addresses, destinations) = match self.is_chained() {
            true => (&[][..], &[][..]),
            false => (
                &attached.interface.addresses[..],
                &attached.interface.routes[..],
            ),
        };
        let ips = list(&mut result, "ips")?;
        for address in addresses {
            let mut ip = json!({ "address": address, "interface": number });
            if self.version == "0.4.0" {
                let family = if address.addr().is_ipv4() { "4" } else { "6" };
                ip["version"] = family.into();
            }
            ips.push(ip);
        }
        let routes = list(&mut result, "routes")?;
        routes.extend(destinations.iter().map(|it| json!({ "dst": it })));
        let dns = result.entry("dns").or_insert(Value::Null);
        if dns.is_null() {
            *dns = json!({});
        }
        let dns = dns.as_object_mut().ok_or_else(|| odd("dns"))?;
        let servers: Vec<_> = attached.dns_servers.iter().map(IpAddr::to_string).collect();
        join(dns, "nameservers", &servers, true)?;
        join(dns, "search", &attached.search_domains, false)?;
        Ok(result.into())
    }

    /// The addresses that the result of ADD told of this device in the container: none in a chain.
    pub fn addresses(&self, device: &str) -> Result<Vec<IpNet>, Failure> {
        let mut previous = self.previous.clone().unwrap_or_default();
        let is_own = |it: &Value| {
            let sandbox = it["sandbox"].as_str().unwrap_or_default();
            it["name"] == device && !sandbox.is_empty()
        };
        let number = list(&mut previous, "interfaces")?.iter().position(is_own);
        let number = number.ok_or_else(|| {
            let msg = format!("prevResult does not tell of the interface {device}");
            Failure::new(Code::Missing, msg)
        })?;
        let ips = list(&mut previous, "ips")?.iter();
        ips.filter(|ip| ip["interface"] == number)
            .map(|ip| IpNet::deserialize(&ip["address"]).map_err(|_| odd("ips")))
            .collect()
    }
}

/// What VERSION answers.
pub fn versions(asked: &str) -> Value {
    json!({ "cniVersion": asked, "supportedVersions": VERSIONS })
}

/// A container's id and a network's name are made of the same letters.
fn is_name(text: &str) -> bool {
    let letter = |c: char| c.is_ascii_alphanumeric();
    text.starts_with(letter) && text.chars().all(|c| letter(c) || "_.-".contains(c))
}

/// An option's value as other surfaces give it.
fn text_of(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Bool(flag) => Some(flag.to_string()),
        Value::Array(texts) => {
            let texts: Option<Vec<&str>> = texts.iter().map(Value::as_str).collect();
            Some(texts?.join("+"))
        }
        _ => None,
    }
}

/// A list of an earlier result; one that is not there is empty.
fn list<'a>(result: &'a mut Map<String, Value>, key: &str) -> Result<&'a mut Vec<Value>, Failure> {
    let value = result.entry(key).or_insert(Value::Null);
    if value.is_null() {
        *value = Value::Array(Vec::new());
    }
    value.as_array_mut().ok_or_else(|| odd(key))
}

/// Adds texts to a list of the DNS part, each once.
fn join(
    dns: &mut Map<String, Value>,
    key: &str,
    texts: &[String],
    first: bool,
) -> Result<(), Failure> {
    if texts.is_empty() {
        return Ok(());
    }
    let all = list(dns, key)?;
    all.retain(|it| !texts.iter().any(|text| it == text));
    let at = if first { 0 } else { all.len() };
    all.splice(at..at, texts.iter().cloned().map(Value::from));
    Ok(())
}

fn odd(key: &str) -> Failure {
    let msg = format!("prevResult: {key} is not of the form that the specification gives it");
    Failure::new(Code::Decode, msg)
}

/// Says where and not what: a configuration may hold what should not be shown.
fn undecoded(error: serde_json::Error) -> Failure {
    let msg = match error.line() {
        0 => "the network's configuration has a field of another form than the specification's"
            .to_owned(),
        line => format!(
            "the network's configuration is no JSON: line {line}, column {}",
            error.column()
        ),
    };
    Failure::new(Code::Decode, msg)
}

#[cfg(test)]
mod tests;
