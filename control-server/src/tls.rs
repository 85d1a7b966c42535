//! HTTPS of our own: the certificate, and how connections are secured with it.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use tokio_rustls::TlsAcceptor;

use crate::Error;

/// Where the server's certificate is.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// PEM: its certificate, then those that lead to the CA.
    pub cert: PathBuf,
    /// PEM: the key of the first certificate.
    pub key: PathBuf,
}

/// Reads the files and makes ready to serve TLS 1.2 and 1.3 with them.
pub(crate) fn acceptor(files: &TlsFiles) -> Result<TlsAcceptor, Error> {
    let bad = |path: &Path, reason: String| Error::Tls {
        path: path.to_owned(),
        reason,
    };
    let certificates = CertificateDer::pem_file_iter(&files.cert)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| bad(&files.cert, error.to_string()))?;
    if certificates.is_empty() {
        return Err(bad(&files.cert, "there is no certificate in it".into()));
    }
    let key = PrivateKeyDer::from_pem_file(&files.key)
        .map_err(|error| bad(&files.key, error.to_string()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| {
            builder
                .with_no_client_auth()
                .with_single_cert(certificates, key)
        })
        .map_err(|error| bad(&files.key, error.to_string()))?;
    // What is behind speaks nothing newer, and clients would choose HTTP/2.
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}
