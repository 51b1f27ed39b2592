-- Beside the catalog, which POSTGRES_DB makes.
CREATE DATABASE mlflow;
CREATE DATABASE airflow;
