//! The program as a shell sees it, as far as it goes without the daemon.

#![allow(
    clippy::unwrap_used,
    reason = "a test reports by panicking, and not only in its own body"
)]

use std::{
    fs::File,
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixListener,
    process::{Command, Stdio},
    thread,
};

use rustix::{
    fs::OFlags,
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{LocalModes, tcgetattr},
};
use tempfile::TempDir;

/// Exit status, standard output and standard error.
fn tailnode(arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_tailnode"))
        .args(arguments)
        .env("TAILNODE_SOCKET", "/nowhere/tailnoded.sock")
        .output()
        .unwrap();
    (
        output.status.code(),
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

#[test]
fn without_the_daemon_it_says_what_to_start() {
    for arguments in [
        &["status"][..],
        &["status", "--json"],
        &["status", "web"],
        &["explain", "web"],
        &["forget", "web"],
        &["state", "export", "web", "-"],
        &["state", "import", "/dev/null"],
    ] {
        let (status, output, error) = tailnode(arguments);
        assert_eq!((status, &*output), (Some(1), ""), "{arguments:?}");
        for words in ["tailnode: ", "/nowhere/tailnoded.sock", "systemctl start"] {
            assert!(error.contains(words), "{arguments:?}: {error}");
        }
    }
}

#[test]
fn version_and_help_need_no_daemon_and_wrong_usage_is_2() {
    let (status, output, _) = tailnode(&["--version"]);
    assert_eq!(status, Some(0));
    assert_eq!(
        output,
        concat!("tailnode ", env!("CARGO_PKG_VERSION"), "\n")
    );
    let (status, output, _) = tailnode(&["status", "--help"]);
    assert_eq!(status, Some(0));
    assert!(output.contains("Exit status"), "{output}");
    for arguments in [&["options"][..], &["options", "--man"]] {
        let (status, output, _) = tailnode(arguments);
        assert_eq!(status, Some(0));
        let output = output.replace("\\-", "-");
        assert!(output.contains("exit-node-allow-lan-access"), "{output}");
    }
    for arguments in [
        &[][..],
        &["statsu"],
        &["status", "--jsn"],
        &["forget"],
        &["state"],
        &["state", "export", "web"],
    ] {
        let (status, _, error) = tailnode(arguments);
        assert_eq!(status, Some(2), "{arguments:?}: {error}");
    }
}

#[test]
fn migrate_prints_the_new_file_alone_and_the_rest_as_errors() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/compose/web.yaml");
    let (status, output, error) = tailnode(&["migrate", "compose", file]);
    assert_eq!(status, Some(0), "{error}");
    assert_eq!(output, include_str!("compose/web.new.yaml"));
    assert_eq!(
        error.lines().count(),
        include_str!("compose/web.remarks").lines().count()
    );
    assert!(
        error.lines().all(|line| line.starts_with("tailnode: ")),
        "{error}"
    );

    let migrated = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/compose/web.new.yaml");
    for (file, says) in [
        (migrated, "is a Tailscale sidecar"),
        ("/nowhere.yaml", "cannot be read"),
    ] {
        let (status, output, error) = tailnode(&["migrate", "compose", file]);
        assert_eq!((status, &*output), (Some(1), ""), "{file}");
        assert!(error.contains(says) && error.contains(file), "{error}");
    }
}

/// A daemon that takes one request and says that it is done; it returns the request.
fn daemon(directory: &TempDir) -> thread::JoinHandle<String> {
    let listener = UnixListener::bind(directory.path().join("s.sock")).unwrap();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = String::new();
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        reader.read_line(&mut request).unwrap();
        writeln!(stream, r#"{{"result":"ok"}}"#).unwrap();
        request
    })
}

fn login(directory: &TempDir, input: impl Into<Stdio>) -> std::process::Child {
    Command::new(env!("CARGO_BIN_EXE_tailnode"))
        .args(["login", "tailnet"])
        .env("TAILNODE_SOCKET", directory.path().join("s.sock"))
        .stdin(input)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

#[test]
fn a_key_is_read_from_a_pipe() {
    let directory = TempDir::new().unwrap();
    let daemon = daemon(&directory);
    let mut child = login(&directory, Stdio::piped());
    let mut input = child.stdin.take().unwrap();
    input.write_all(b"tskey-auth-QQQQ\n").unwrap();
    drop(input);
    let output = child.wait_with_output().unwrap();
    let words = String::from_utf8(output.stderr).unwrap();
    assert!(
        output.status.success() && words.contains("network tailnet"),
        "{words}"
    );
    assert_eq!(
        daemon.join().unwrap(),
        "{\"op\":\"login\",\"network\":\"tailnet\",\"key\":\"tskey-auth-QQQQ\"}\n"
    );
}

#[test]
fn what_is_no_key_does_not_reach_the_daemon() {
    for (key, words) in [
        ("", "nothing in it"),
        ("QQQQ QQQQ", "more than one word"),
        ("tskey-client-QQQQ?reusable=1", "baseURL=URL"),
        (&*"QQQQ".repeat(2000), "too long"),
    ] {
        // Nobody listens there: it would be told.
        let directory = TempDir::new().unwrap();
        let mut child = login(&directory, Stdio::piped());
        let mut input = child.stdin.take().unwrap();
        input.write_all(key.as_bytes()).unwrap();
        drop(input);
        let output = child.wait_with_output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(error.contains(words) && !error.contains("QQQQ"), "{error}");
    }
}

#[test]
fn a_key_is_typed_and_not_shown() {
    // Typed to the end, and broken off.
    for (typed, taken) in [
        ("tskey-auth-QQQX\x7fQ\r", true),
        ("tskey-auth-QQQQ\x03", false),
    ] {
        let directory = TempDir::new().unwrap();
        let daemon = daemon(&directory);
        let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&terminal).unwrap();
        unlockpt(&terminal).unwrap();
        let name = ptsname(&terminal, Vec::new()).unwrap();
        let keyboard = File::options()
            .read(true)
            .write(true)
            .open(name.to_str().unwrap())
            .unwrap();
        let before = tcgetattr(&keyboard).unwrap();
        assert!(before.local_modes.contains(LocalModes::ECHO));

        let mut child = login(&directory, keyboard.try_clone().unwrap());
        let mut prompt = [0; 30];
        let mut words = child.stderr.take().unwrap();
        words.read_exact(&mut prompt).unwrap();
        assert_eq!(&prompt, b"Auth key for network tailnet: ");
        let mut terminal = File::from(terminal);
        terminal.write_all(typed.as_bytes()).unwrap();
        assert_eq!(child.wait().unwrap().success(), taken);
        let mut rest = String::new();
        words.read_to_string(&mut rest).unwrap();
        assert!(!rest.contains("QQQ"), "{rest}");
        if taken {
            assert!(
                daemon
                    .join()
                    .unwrap()
                    .contains(r#""key":"tskey-auth-QQQQ""#)
            );
        } else {
            assert!(rest.contains("interrupted"), "{rest}");
        }
        // The terminal showed nothing, and is as it was.
        rustix::fs::fcntl_setfl(&terminal, OFlags::NONBLOCK).unwrap();
        let mut shown = [0; 100];
        let shown = terminal
            .read(&mut shown)
            .map(|length| String::from_utf8_lossy(&shown[..length]).into_owned());
        assert!(shown.is_err(), "{shown:?}");
        assert_eq!(
            tcgetattr(&keyboard).unwrap().local_modes,
            before.local_modes
        );
    }
}

#[test]
fn a_login_is_for_a_network_or_waits_for_containers() {
    for arguments in [
        &["login"][..],
        &["login", "tailnet", "--wait"],
        &["login", "--remove"],
        &["login", "--wait", "--remove"],
        &["login", "tailnet", "--timeout", "5"],
        &["login", "--wait", "web", "--timeout", "soon"],
    ] {
        let (status, _, error) = tailnode(arguments);
        assert_eq!(status, Some(2), "{arguments:?}: {error}");
    }
    for arguments in [
        &["login", "--wait"][..],
        &["login", "--wait", "web", "--timeout", "5"],
    ] {
        let (status, _, error) = tailnode(arguments);
        assert_eq!(status, Some(1), "{arguments:?}: {error}");
        assert!(error.contains("systemctl start"), "{error}");
    }
}
