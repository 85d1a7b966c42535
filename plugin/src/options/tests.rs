use std::{collections::BTreeMap, fs};

use proptest::prelude::*;

use super::*;

fn pairs(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs
        .iter()
        .map(|(k, v)| (k.to_string(), v.to_string()))
        .collect()
}

fn network(list: &[(&str, &str)]) -> Result<Layer, Error> {
    Layer::of_network("tailnet", &pairs(list))
}

fn labels(list: &[(&str, &str)]) -> Result<Layer, Error> {
    Layer::of_marks(&Marks {
        labels: pairs(list),
        ..Marks::default()
    })
}

fn file(text: &str) -> Result<Layer, Error> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.toml");
    fs::write(&path, text).unwrap();
    Layer::of_file(&path)
}

fn options(layer: &Layer) -> Options {
    settle([layer]).unwrap().options
}

fn told(layers: &[&Layer], key: &str) -> Told {
    let settled = settle(layers.iter().copied()).unwrap();
    let mut told = settled.told.into_iter();
    told.find(|told| told.key == key).unwrap()
}

#[test]
fn the_hooks_word_is_no_option() {
    let annotated = Layer::of_marks(&Marks {
        annotations: pairs(&[(TUN_ANNOTATION, "true"), ("tailscale.hostname", "web")]),
        ..Marks::default()
    });
    assert_eq!(
        options(&annotated.unwrap()).hostname.as_deref(),
        Some("web")
    );
    // The hook hears no labels.
    assert!(labels(&[(TUN_ANNOTATION, "true")]).is_err());
}

const SURFACES: [Surface; 4] = [
    Surface::File,
    Surface::Network,
    Surface::Label,
    Surface::Endpoint,
];

/// One option in each form that a surface has for it, with what `explain` calls that.
fn forms(surface: Surface, entry: &Entry, value: &str) -> Vec<(Result<Layer, Error>, String)> {
    let key = entry.key;
    let marks = |marks| Layer::of_marks(&marks);
    match surface {
        Surface::File => {
            let text = match entry.value {
                Value::Flag => format!("{key} = {value}"),
                Value::Word(_) => format!("{key} = '{value}'"),
                Value::List(_) => format!("{key} = ['{}']", value.replace('+', "', '")),
            };
            vec![(file(&text), "file /".into())]
        }
        Surface::Network => vec![(network(&[(key, value)]), "network tailnet".into())],
        Surface::Endpoint => vec![(
            Layer::of_endpoint(&pairs(&[(key, value)])),
            "endpoint".into(),
        )],
        Surface::Label => {
            let names = [format!("tailscale.{key}"), format!("tailscale.com/{key}")];
            let variables = entry.variables.iter().map(|name| name.to_string());
            let flags = std::iter::once(&key).chain(entry.flags);
            let flags = flags.map(|flag| (words::FLAGS.to_owned(), format!("--{flag}={value}")));
            let plain = names.into_iter().chain(variables.clone());
            let plain = plain.map(|name| (name, value.to_owned()));
            let mut forms = Vec::new();
            for (name, value) in plain.chain(flags.clone()) {
                let (label, annotation) = (Marks::default(), Marks::default());
                let pair = pairs(&[(&name, &value)]);
                forms.push((
                    marks(Marks {
                        labels: pair.clone(),
                        ..label
                    }),
                    format!("label {name}"),
                ));
                forms.push((
                    marks(Marks {
                        annotations: pair,
                        ..annotation
                    }),
                    format!("annotation {name}"),
                ));
            }
            let variables = variables.map(|name| (name, value.to_owned()));
            for (name, value) in variables.chain(flags) {
                forms.push((
                    marks(Marks {
                        environment: pairs(&[(&name, &value)]),
                        ..Marks::default()
                    }),
                    format!("environment {name}"),
                ));
            }
            forms
        }
    }
}

#[test]
fn every_option_on_every_surface() {
    for entry in TABLE {
        for surface in SURFACES {
            for (layer, origin) in forms(surface, entry, entry.examples[0]) {
                let what = format!("{} as {origin}", entry.key);
                if !entry.surfaces.contains(&surface) {
                    let error = layer.err().unwrap_or_else(|| panic!("{what}")).to_string();
                    assert!(error.contains(entry.elsewhere), "{what}: {error}");
                    assert!(!entry.elsewhere.is_empty(), "{what}");
                    continue;
                }
                let layer = layer.unwrap_or_else(|error| panic!("{what}: {error}"));
                if entry.key == "lock" {
                    assert_eq!(
                        told(&[&layer], "tags").locked_by.unwrap().get(..6),
                        origin.get(..6)
                    );
                    continue;
                }
                let mut wanted = Options::default();
                (entry.read)(&mut wanted, entry.examples[0]).unwrap();
                assert_eq!(options(&layer), wanted, "{what}");
                let told = told(&[&layer], entry.key);
                assert_eq!(told.value, entry.examples[0], "{what}");
                assert!(told.origin.starts_with(&origin), "{what}: {told:?}");
            }
        }
    }
}

#[test]
fn of_every_two_surfaces_the_later_one_is_heard() {
    let mut checked = 0;
    for entry in TABLE.iter().filter(|entry| entry.key != "lock") {
        for (at, low) in entry.surfaces.iter().enumerate() {
            for high in &entry.surfaces[at + 1..] {
                assert!(low < high);
                for (lower, _) in forms(*low, entry, entry.examples[0]) {
                    for (higher, origin) in forms(*high, entry, entry.examples[1]) {
                        let (lower, higher) = (lower.as_ref().unwrap(), higher.unwrap());
                        let settled = settle([lower, &higher]).unwrap();
                        let what = format!("{} in {low:?} and as {origin}", entry.key);
                        assert_eq!(settled.options, options(&higher), "{what}");
                        let told = told(&[lower, &higher], entry.key);
                        assert_eq!(told.value, entry.examples[1], "{what}");
                        assert!(told.origin.starts_with(&origin), "{what}");
                        checked += 1;
                    }
                }
            }
        }
    }
    assert!(checked > 200, "{checked}");
}

#[test]
fn a_lock_holds_on_every_surface_above_it() {
    for entry in TABLE.iter().filter(|entry| entry.key != "lock") {
        for (low, lock) in [
            (Surface::File, file(&format!("lock = ['{}']", entry.key))),
            (Surface::Network, network(&[("lock", entry.key)])),
        ] {
            let lock = lock.unwrap();
            for high in entry.surfaces.iter().filter(|high| **high > low) {
                for (higher, origin) in forms(*high, entry, entry.examples[0]) {
                    let what = format!("{} locked in {low:?}, as {origin}", entry.key);
                    let error = settle([&lock, &higher.unwrap()])
                        .expect_err(&what)
                        .to_string();
                    let owner = match low {
                        Surface::File => ["config.toml locks it", "may change that"],
                        _ => ["the network tailnet locks it", "The network's owner may"],
                    };
                    assert!(
                        error.contains(&format!("`{}`", entry.key)),
                        "{what}: {error}"
                    );
                    for words in owner {
                        assert!(error.contains(words), "{what}: {error}");
                    }
                }
            }
        }
        // Who locks an option may set it.
        for (surface, locked_by) in [
            (Surface::File, "file /"),
            (Surface::Network, "network tailnet"),
        ] {
            if !entry.surfaces.contains(&surface) {
                continue;
            }
            let value = entry.examples[0];
            let layer = match surface {
                Surface::Network => network(&[("lock", entry.key), (entry.key, value)]),
                _ => match entry.value {
                    Value::Flag => file(&format!("lock = '{0}'\n{0} = {value}", entry.key)),
                    _ => file(&format!("lock = '{0}'\n{0} = '{value}'", entry.key)),
                },
            };
            let told = told(&[&layer.unwrap()], entry.key);
            assert_eq!(told.value, value);
            assert!(told.locked_by.unwrap().starts_with(locked_by));
        }
    }
    let error = network(&[("lock", "tag")]).unwrap_err().to_string();
    assert!(error.contains("did you mean `tags`?"), "{error}");
    assert!(network(&[("lock", "lock")]).is_err());
}

#[test]
fn of_one_options_names_the_nearest_to_ours_is_heard() {
    // Each is heard over all that come before it.
    let names = [
        ("environment", "TS_HOSTNAME", "a"),
        ("environment", "TS_EXTRA_ARGS", "--hostname=b"),
        ("annotation", "TS_HOSTNAME", "c"),
        ("annotation", "TS_EXTRA_ARGS", "--hostname d"),
        ("annotation", "tailscale.com/hostname", "e"),
        ("annotation", "tailscale.hostname", "f"),
        ("label", "TS_HOSTNAME", "g"),
        ("label", "TS_EXTRA_ARGS", "-hostname h"),
        ("label", "tailscale.com/hostname", "i"),
        ("label", "tailscale.hostname", "j"),
    ];
    let mut marks = Marks::default();
    for (kind, name, value) in names {
        let pairs = match kind {
            "environment" => &mut marks.environment,
            "annotation" => &mut marks.annotations,
            _ => &mut marks.labels,
        };
        pairs.insert(name.to_owned(), value.to_owned());
        let layer = Layer::of_marks(&marks).unwrap();
        assert_eq!(told(&[&layer], "hostname").origin, format!("{kind} {name}"));
        let wanted = value.rsplit(['=', ' ']).next().map(str::to_owned);
        assert_eq!(options(&layer).hostname, wanted);
    }
}

#[test]
fn what_others_write_there_is_left_alone() {
    let layer = Layer::of_marks(&Marks {
        labels: pairs(&[
            ("tailscale.com/expose", "true"),
            ("tailscale.com/proxy-group", "x"),
            ("hostname", "x"),
            ("maintainer", "y"),
        ]),
        annotations: pairs(&[("io.podman.annotations.autoremove", "TRUE")]),
        environment: pairs(&[
            ("TS_NODE_PROJECT", "tsconfig.json"),
            ("TS_STATE_DIR", "/var/lib/tailscale"),
            // Only labels and annotations have these.
            ("tailscale.hostname", "x"),
        ]),
    });
    assert_eq!(layer.unwrap(), Layer::default());
}

#[test]
fn a_key_in_any_place_is_refused_and_not_repeated() {
    let keys = TABLE.iter().map(|entry| entry.key);
    for key in keys.chain(["authkey", "tskey-auth-QQQQ", "x"]) {
        for value in ["tskey-auth-QQQQ", "web-hskey-auth-QQQQ", "tag:a+tskey-QQQQ"] {
            let label = format!("tailscale.{key}");
            for error in [
                network(&[(key, value)]).unwrap_err(),
                Layer::of_endpoint(&pairs(&[(key, value)])).unwrap_err(),
                labels(&[(&label, value)]).unwrap_err(),
                file(&format!("{key} = '{value}'")).unwrap_err(),
            ] {
                assert!(!format!("{error} {error:?}").contains("QQQQ"), "{error:?}");
            }
        }
    }
    for text in [
        "auth-key = tskey-auth-QQQQ",
        "auth-key = 'tskey-auth-QQQQ",
        "tskey-auth-QQQQ",
        "tskey-auth-QQQQ = 1",
        "tskey-auth-QQQQ = 'a'\ntskey-auth-QQQQ = 'b'",
        "[tskey-auth-QQQQ]",
        "[tskey-auth-QQQQ]\n[tskey-auth-QQQQ]",
        "auth-key = ['tskey-auth-QQQQ']",
        "auth-key = { tskey-auth-QQQQ = 1 }",
        "ephemeral = [true, 'tskey-auth-QQQQ']",
        "tags = \"tskey-auth-QQQQ\\x\"",
    ] {
        let error = file(text).unwrap_err();
        assert!(
            !format!("{error} {error:?}").contains("QQQQ"),
            "{text}: {error:?}"
        );
    }
    for key in ["auth-key", "hostname", "tskey-auth-QQQQ"] {
        let error = network(&[(key, "tskey-auth-QQQQ")]).unwrap_err();
        assert!(
            error.to_string().contains("`tailnode login NETWORK`"),
            "{error}"
        );
    }
}

#[test]
fn values_mean_what_they_say() {
    let layer = network(&[
        ("hostname", "Web_1"),
        ("login-server", "https://headscale.example.com"),
        ("auth-key", "file:/etc/tailnode/auth.key"),
        ("require-login", "true"),
        ("ephemeral", "true"),
        ("tags", "tag:web+prod"),
        ("accept-dns", "false"),
        ("accept-routes", "true"),
        ("advertise-routes", "10.0.0.0/24+fd00:1::/64, 10.1.0.7/32"),
        ("advertise-exit-node", "false"),
        ("exit-node", "Gw.example.ts.net."),
        ("exit-node-allow-lan-access", "true"),
    ]);
    let options = options(&layer.unwrap());
    assert_eq!(
        options,
        Options {
            hostname: Some("web-1".into()),
            login_server: Some("https://headscale.example.com".parse().unwrap()),
            auth_key: Some(KeySource::File("/etc/tailnode/auth.key".into())),
            require_login: true,
            ephemeral: true,
            tags: vec!["tag:web".into(), "tag:prod".into()],
            accept_dns: Some(false),
            accept_routes: true,
            advertise_routes: vec![
                "10.0.0.0/24".parse().unwrap(),
                "fd00:1::/64".parse().unwrap(),
                "10.1.0.7/32".parse().unwrap(),
            ],
            advertise_exit_node: false,
            exit_node: Some(ExitNode::Name("gw.example.ts.net".into())),
            exit_node_allow_lan_access: true,
        }
    );
    assert_eq!(options.exit(), Exit::BesideLan);
    assert!(!options.accepts_dns() && Options::default().accepts_dns());
}

#[test]
fn what_is_wrong_is_said_with_what_is_right() {
    for (key, value, words) in [
        (
            "hostnmae",
            "a",
            "unknown option `hostnmae` on the network: did you mean `hostname`?",
        ),
        ("auth_key", "a", "did you mean `auth-key`?"),
        ("Tags", "a", "did you mean `tags`?"),
        ("advertise-tag", "a", "did you mean `tags`?"),
        (
            "colour",
            "a",
            "there are hostname, login-server, auth-key, require-login, ephemeral, tags, ",
        ),
        ("accept-routes", "yes", "must be true or false"),
        (
            "advertise-routes",
            "10.0.0.0/24+10.0.1.1/24",
            "10.0.1.1/24 has bits set beyond its prefix: do you mean 10.0.1.0/24?",
        ),
        ("advertise-routes", "fd00::5", "write fd00::5/128"),
        (
            "advertise-routes",
            "0.0.0.0/0",
            "set advertise-exit-node=true",
        ),
        ("advertise-routes", "lan", "is no network"),
        ("exit-node", "a b", "neither the name of a node"),
        ("hostname", "…", "no letter or digit"),
        ("login-server", "headscale", "it should look like https://"),
        ("login-server", "ftp://h", "must begin with https://"),
        ("login-server", "https://u:p@h", "must not hold a user"),
        ("ephemeral", "yes", "must be true or false"),
        ("tags", "tag:9", "is no tag"),
        ("auth-key", "file:auth.key", "comes an absolute path"),
        ("ssh", "true", "tailnode does not run Tailscale SSH yet"),
        (
            "serve.443",
            "/",
            "tailnode does not run Tailscale Serve yet",
        ),
        (
            "funnel",
            "true",
            "tailnode does not run Tailscale Funnel yet",
        ),
    ] {
        let error = network(&[(key, value)]).unwrap_err().to_string();
        assert!(error.contains(words), "{error:?} does not say {words:?}");
    }
    for (name, value, words) in [
        (
            "tailscale.hostnam",
            "a",
            "in the label tailscale.hostnam: did you mean",
        ),
        (
            "tailscale.com/funnel",
            "true",
            "does not run Tailscale Funnel yet",
        ),
        ("TS_SERVE_CONFIG", "/x", "does not run Tailscale Serve yet"),
        (
            "TS_EXTRA_ARGS",
            "--ssh",
            "`ssh` in the label TS_EXTRA_ARGS: tailnode does not run",
        ),
        (
            "TS_EXTRA_ARGS",
            "--acept-routes",
            "did you mean `accept-routes`?",
        ),
    ] {
        let error = labels(&[(name, value)]).unwrap_err().to_string();
        assert!(error.contains(words), "{error:?} does not say {words:?}");
    }
}

#[test]
fn an_exit_uses_no_other() {
    let both = network(&[("exit-node", "gw"), ("advertise-exit-node", "true")]);
    assert!(matches!(both, Err(Error::BothExits)));
    let (exit, offer) = (
        network(&[("exit-node", "gw")]).unwrap(),
        labels(&[("tailscale.advertise-exit-node", "true")]).unwrap(),
    );
    assert!(matches!(settle([&exit, &offer]), Err(Error::BothExits)));
    // Its own container need not use it.
    let not_this = Layer::of_endpoint(&pairs(&[("exit-node", "")])).unwrap();
    assert!(settle([&exit, &offer, &not_this]).is_ok());
    let lan = network(&[("exit-node-allow-lan-access", "true")]).unwrap();
    assert_eq!(options(&lan).exit(), Exit::No);
}

#[test]
fn a_secret_given_inline_is_refused_everywhere_and_not_repeated() {
    let secret = "tskey-auth-abc";
    for entry in TABLE {
        for surface in SURFACES {
            for (layer, origin) in forms(surface, entry, secret) {
                let error = layer.expect_err(&origin);
                assert!(!format!("{error} {error:?}").contains("abc"), "{error:?}");
            }
        }
    }
    for value in ["https://u:abc@", "https://u:abc@h"] {
        let error = network(&[("login-server", value)]).unwrap_err();
        assert!(!format!("{error} {error:?}").contains("abc"), "{error:?}");
    }
    let error = network(&[("auth-key", "of-headscale-abc")]).unwrap_err();
    assert!(!format!("{error} {error:?}").contains("abc"), "{error:?}");
}

#[test]
fn the_file_speaks_the_same_words() {
    let directory = tempfile::tempdir().unwrap();
    let none = Layer::of_file(&directory.path().join("none")).unwrap();
    assert_eq!(none, Layer::default());
    assert_eq!(file("# nothing\n").unwrap(), Layer::default());
    for (text, words) in [
        ("hostname = 'web'", "every container's"),
        ("login_server = 'https://h'", "did you mean `login-server`?"),
        ("ephemeral = 1", "must be a text, true or false"),
        ("exit-node = ['gw']", "must be a text, true or false"),
    ] {
        let error = file(text).unwrap_err().to_string();
        assert!(
            error.contains(words) && error.contains("config.toml"),
            "{error}"
        );
    }
    let error = file("# a\n\nauth-key = tskey-auth-abc").unwrap_err();
    assert!(!format!("{error} {error:?}").contains("abc"), "{error:?}");
    assert!(error.to_string().contains("line 3"), "{error}");
}

#[test]
fn the_shipped_file_shows_options_that_are_good() {
    let shipped = include_str!("../../../packaging/config.toml");
    assert_eq!(file(shipped).unwrap(), Layer::default());
    let settings = shipped.lines().filter_map(|line| line.strip_prefix('#'));
    let settings: Vec<_> = settings.filter(|line| !line.starts_with(' ')).collect();
    assert!(settings.len() > 2);
    assert_ne!(file(&settings.join("\n")).unwrap(), Layer::default());
}

#[test]
fn names_become_dns_labels() {
    for (name, label) in [
        ("web", Some("web")),
        ("My_App.1", Some("my-app-1")),
        ("_x-", Some("x")),
        ("...", None),
        ("", None),
    ] {
        assert_eq!(dns_label(name).as_deref(), label, "{name}");
    }
}

proptest! {
    #[test]
    fn a_label_is_always_a_label(name: String) {
        if let Some(label) = dns_label(&name) {
            prop_assert!((1..=MAX_LABEL).contains(&label.len()));
            prop_assert!(label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'));
            prop_assert!(!label.starts_with('-') && !label.ends_with('-'));
            let again = dns_label(&label);
            prop_assert_eq!(again, Some(label));
        }
    }

    #[test]
    fn no_pair_panics(key: String, value: String) {
        let (one, known) = (pairs(&[(&key, &value)]), TABLE.iter().map(|entry| (entry.key, &*value)));
        let _ = (network(&[(&key, &value)]), Layer::of_endpoint(&one), labels(&[(&key, &value)]));
        for pair in known {
            let _ = (network(&[pair]), labels(&[("TS_EXTRA_ARGS", &value)]));
        }
    }
}
